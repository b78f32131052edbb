/* From the kernel's first process to a machine with a root file system: loads the modules that the disks
 * need, mounts the images read-only with memory above them, and what every distribution mounts: pure cgroup2,
 * bpffs, /proc, /sys.
 *
 * Disks are known by their serial: `userland` is the root, `packages` and `checkout` together /ebbtide,
 * `modules` the kernel's own modules, `state` what survives a power cut (at /state, optional). Of the
 * kernel's command line: ebb.clock=SECONDS is added to the clock, ebb.hostname=NAME, ebb.init=PATH is what
 * becomes the first process, with /state/units as /etc/systemd/system and /state/opt as /opt. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "guest.h"

#define DISK_WAIT_MS 20000
#define PORT_NAME "ebb.command"

void die(const char* format, ...) {
  va_list arguments;

  va_start(arguments, format);
  fprintf(stderr, "guest: ");
  vfprintf(stderr, format, arguments);
  fprintf(stderr, "\n");
  va_end(arguments);
  sync();
  reboot(RB_POWER_OFF);
  for (;;) pause();
}

int read_line(const char* path, char* text, size_t size) {
  int fd = open(path, O_RDONLY | O_CLOEXEC);
  ssize_t length = fd < 0 ? -1 : read(fd, text, size - 1);

  if (fd >= 0) close(fd);
  text[length > 0 ? length : 0] = 0;
  text[strcspn(text, "\n")] = 0;
  return length >= 0;
}

static void make_directory(const char* path) {
  if (mkdir(path, 0755) && errno != EEXIST) die("mkdir %s: %s", path, strerror(errno));
}

static void mount_at(const char* source, const char* target, const char* type, unsigned long flags,
                     const char* data) {
  make_directory(target);
  if (mount(source, target, type, flags, data))
    die("mount of %s (%s) at %s: %s", source, type ? type : "", target, strerror(errno));
}

/* What not every kernel has. */
static void try_mount(const char* type, const char* target) {
  if (mount(type, target, type, MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL))
    fprintf(stderr, "guest: no %s at %s: %s\n", type, target, strerror(errno));
}

static int write_file(const char* path, const char* text) {
  int fd = open(path, O_WRONLY | O_CLOEXEC);
  ssize_t size = fd < 0 ? -1 : write(fd, text, strlen(text));

  if (fd >= 0) close(fd);
  return size < 0 ? -1 : 0;
}

/* The files that the host put into the initial memory disk, in their order. */
static void load_modules(void) {
  FILE* list = fopen("/modules.list", "re");
  char path[256];

  if (!list) die("/modules.list: %s", strerror(errno));
  while (fgets(path, sizeof(path), list)) {
    path[strcspn(path, "\n")] = 0;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) die("%s: %s", path, strerror(errno));
    if (syscall(SYS_finit_module, fd, "", 0) && errno != EEXIST) die("loading %s: %s", path, strerror(errno));
    close(fd);
  }
  fclose(list);
}

/* Device of the disk with this serial; 0 where it does not come in time. */
static int find_disk(const char* serial, char* device, size_t size, int wait_ms) {
  for (int waited = 0;; waited += 10) {
    DIR* blocks = opendir("/sys/block");
    struct dirent* entry;
    int found = 0;

    while (blocks && !found && (entry = readdir(blocks))) {
      char path[300], text[32];
      snprintf(path, sizeof(path), "/sys/block/%s/serial", entry->d_name);
      if (!read_line(path, text, sizeof(text)) || strcmp(text, serial)) continue;
      snprintf(device, size, "/dev/%s", entry->d_name);
      found = 1;
    }
    if (blocks) closedir(blocks);
    if (found || waited >= wait_ms) return found;
    usleep(10000);
  }
}

static void mount_disk(const char* serial, const char* target) {
  char device[64];

  if (!find_disk(serial, device, sizeof(device), DISK_WAIT_MS)) die("no disk with serial %s", serial);
  mount_at(device, target, "ext4", MS_RDONLY, NULL);
}

/* Value of a parameter of the kernel's command line, or nothing. */
static const char* parameter(const char* name) {
  static char line[4096];
  static char value[256];
  size_t length = strlen(name);

  if (!read_line("/proc/cmdline", line, sizeof(line))) return NULL;
  for (char* word = strtok(line, " "); word; word = strtok(NULL, " "))
    if (!strncmp(word, name, length) && word[length] == '=') {
      snprintf(value, sizeof(value), "%s", word + length + 1);
      return value;
    }
  return NULL;
}

/* A kernel on KVM has the host's time, whatever the clock chip says; so it is set here, before anything runs.
 */
static void set_clock(void) {
  const char* offset = parameter("ebb.clock");
  struct timespec now;

  if (!offset) return;
  clock_gettime(CLOCK_REALTIME, &now);
  now.tv_sec += atoll(offset);
  if (clock_settime(CLOCK_REALTIME, &now)) die("setting the clock: %s", strerror(errno));
}

static void set_up_loopback(void) {
  struct ifreq request = {.ifr_name = "lo"};
  int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);

  if (fd < 0 || ioctl(fd, SIOCGIFFLAGS, &request)) die("loopback: %s", strerror(errno));
  request.ifr_flags |= IFF_UP;
  if (ioctl(fd, SIOCSIFFLAGS, &request)) die("loopback: %s", strerror(errno));
  close(fd);
}

/* The images, with memory above those that are written to, become /. */
static void make_root(void) {
  char device[64];

  mount_at("tmpfs", "/layers", "tmpfs", 0, "mode=0755,size=100%");
  mount_disk("userland", "/layers/userland");
  mount_disk("packages", "/layers/packages");
  mount_disk("checkout", "/layers/checkout");
  make_directory("/layers/root.new");
  make_directory("/layers/root.work");
  make_directory("/layers/ebbtide.new");
  make_directory("/layers/ebbtide.work");
  mount_at("overlay", "/root", "overlay", 0,
           "lowerdir=/layers/userland,upperdir=/layers/root.new,workdir=/layers/root.work");
  mount_at(
      "overlay", "/root/ebbtide", "overlay", 0,
      "lowerdir=/layers/checkout:/layers/packages,upperdir=/layers/ebbtide.new,workdir=/layers/ebbtide.work");
  make_directory("/root/usr/lib/modules");
  mount_disk("modules", "/root/usr/lib/modules");
  if (find_disk("state", device, sizeof(device), 0))
    mount_at(device, "/root/state", "ext4", MS_NOATIME, NULL);
  mount_at("/proc", "/root/proc", NULL, MS_MOVE, NULL);
  mount_at("/sys", "/root/sys", NULL, MS_MOVE, NULL);
  mount_at("/dev", "/root/dev", NULL, MS_MOVE, NULL);
  if (chdir("/root") || mount(".", "/", NULL, MS_MOVE, NULL) || chroot(".") || chdir("/"))
    die("changing the root: %s", strerror(errno));
  // As systemd has it: mounts show in other mount namespaces.
  if (mount(NULL, "/", NULL, MS_REC | MS_SHARED, NULL)) die("sharing mounts: %s", strerror(errno));
}

static void mount_usual(void) {
  mount_at("devpts", "/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "gid=5,mode=620,ptmxmode=000");
  mount_at("tmpfs", "/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777");
  mount_at("tmpfs", "/run", "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755");
  mount_at("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777");
  make_directory("/run/netns");
  make_directory("/run/lock");
  mount_at("cgroup2", "/sys/fs/cgroup", "cgroup2", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
  try_mount("bpf", "/sys/fs/bpf");
  try_mount("tracefs", "/sys/kernel/tracing");
  try_mount("debugfs", "/sys/kernel/debug");
  const char* controllers[] = {"+cpu", "+memory", "+pids", "+io"};
  for (size_t i = 0; i < sizeof(controllers) / sizeof(*controllers); i++)
    if (write_file("/sys/fs/cgroup/cgroup.subtree_control", controllers[i]))
      fprintf(stderr, "guest: cgroup controller %s: %s\n", controllers[i], strerror(errno));
}

static void bind_mount(const char* from, const char* to) {
  make_directory(from);
  make_directory(to);
  if (mount(from, to, NULL, MS_BIND, NULL)) die("mount of %s at %s: %s", from, to, strerror(errno));
}

/* The first process is another program from here; commands are taken beside it. */
static void hand_over(const char* program) {
  /* Not the first boot of this machine, or every unit that it has would be enabled. */
  int fd = open("/etc/machine-id", O_WRONLY | O_CREAT | O_CLOEXEC, 0444);

  if (fd < 0) die("/etc/machine-id: %s", strerror(errno));
  close(fd);
  if (write_file("/etc/machine-id", "ebb00000000000000000000000000001\n"))
    die("/etc/machine-id is not written");
  bind_mount("/state/units", "/etc/systemd/system");
  bind_mount("/state/opt", "/opt");
  if (fork() == 0) {
    setsid();
    serve(PORT_NAME);
  }
  execl(program, program, NULL);
  die("%s: %s", program, strerror(errno));
}

int main(void) {
  struct rlimit files = {.rlim_cur = 1024, .rlim_max = 524288};
  const char* name;

  setsid();
  mount_at("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
  mount_at("sysfs", "/sys", "sysfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
  make_directory("/dev");
  if (mount("devtmpfs", "/dev", "devtmpfs", MS_NOSUID, "mode=0755") && errno != EBUSY)
    die("devtmpfs: %s", strerror(errno));
  set_clock();
  load_modules();
  make_root();
  mount_usual();
  set_up_loopback();
  name = parameter("ebb.hostname");
  if (name && sethostname(name, strlen(name))) die("host name: %s", strerror(errno));
  setrlimit(RLIMIT_NOFILE, &files);
  setenv("PATH", "/ebbtide/node_modules/.bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
         1);
  setenv("HOME", "/root", 1);
  setenv("LANG", "C.UTF-8", 1);
  name = parameter("ebb.init");
  if (name) hand_over(name);
  serve(PORT_NAME);
}
