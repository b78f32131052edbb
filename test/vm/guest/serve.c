/* Runs commands for the host, any number at the same time, over one virtio port.
 *
 * A frame is a header of three little-endian words (id, type, length) and `length` bytes. The host chooses
 * ids. Both sides begin anew at each boot: the guest says HELLO with sixteen random bytes until the host
 * answers with MARK and the same bytes; what comes before, left from before a power cut, is skipped. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <unistd.h>

#include "guest.h"

#define MAX_COMMANDS 512
#define MAX_FRAME (4u << 20)
#define CHUNK 32768
#define HELLO_EVERY_MS 200
#define EXEC_FAILED 127

/* As in test/vm/lib/frames.ts. */
enum { RUN = 1, INPUT = 2, INPUT_END = 3, SIGNAL = 4 };
enum { HELLO = 1, OUTPUT = 2, ERRORS = 3, OUTPUT_END = 4, ERRORS_END = 5, EXIT = 6 };
static const char kMark[16] = "ebb-guest-begin\n";

struct header {
  uint32_t id, type, length;
};

struct command {
  uint32_t id;
  pid_t pid; /* 0: reaped */
  int in, out, err;
  char* pending; /* input that the command has not read yet */
  size_t pending_size;
  int end_input;
  int used;
};

static struct command commands[MAX_COMMANDS];
static int port;

static void write_all(int fd, const void* data, size_t size) {
  for (const char* at = data; size > 0;) {
    ssize_t done = write(fd, at, size);
    if (done < 0 && (errno == EINTR || errno == EAGAIN)) {
      struct pollfd wait = {.fd = fd, .events = POLLOUT};
      poll(&wait, 1, 1000);
      continue;
    }
    if (done <= 0) die("writing to the host: %s", strerror(errno));
    at += done;
    size -= (size_t)done;
  }
}

static void send_frame(uint32_t id, uint32_t type, const void* data, uint32_t length) {
  struct header header = {id, type, length};

  write_all(port, &header, sizeof(header));
  if (length) write_all(port, data, length);
}

static void open_port(const char* name) {
  for (int tries = 0; tries < 1000; tries++, usleep(10000)) {
    DIR* ports = opendir("/sys/class/virtio-ports");
    struct dirent* entry;

    while (ports && (entry = readdir(ports))) {
      char path[320], text[64];
      snprintf(path, sizeof(path), "/sys/class/virtio-ports/%s/name", entry->d_name);
      if (!read_line(path, text, sizeof(text)) || strcmp(text, name)) continue;
      snprintf(path, sizeof(path), "/dev/%s", entry->d_name);
      port = open(path, O_RDWR | O_CLOEXEC | O_NONBLOCK);
      if (port < 0) die("%s: %s", path, strerror(errno));
      closedir(ports);
      return;
    }
    if (ports) closedir(ports);
  }
  die("no virtio port %s", name);
}

/* Says HELLO until the host has said the same bytes back. */
static void greet(void) {
  unsigned char expected[32], seen[32] = {0};

  memcpy(expected, kMark, 16);
  if (getrandom(expected + 16, 16, 0) != 16) die("no random bytes: %s", strerror(errno));
  for (;;) {
    struct pollfd wait = {.fd = port, .events = POLLIN};
    send_frame(0, HELLO, expected, sizeof(expected));
    if (poll(&wait, 1, HELLO_EVERY_MS) <= 0) continue;
    for (unsigned char byte; read(port, &byte, 1) == 1;) {
      memmove(seen, seen + 1, sizeof(seen) - 1);
      seen[31] = byte;
      if (!memcmp(seen, expected, sizeof(seen))) return;
    }
    // The host is not connected yet: poll() says POLLHUP at once.
    usleep(HELLO_EVERY_MS * 1000 / 4);
  }
}

static struct command* find(uint32_t id) {
  for (int i = 0; i < MAX_COMMANDS; i++)
    if (commands[i].used && commands[i].id == id) return &commands[i];
  return NULL;
}

static void close_input(struct command* command) {
  if (command->in >= 0) close(command->in);
  command->in = -1;
  free(command->pending);
  command->pending = NULL;
  command->pending_size = 0;
}

static void release_if_done(struct command* command) {
  if (command->pid || command->out >= 0 || command->err >= 0) return;
  close_input(command);
  command->used = 0;
}

static void feed(struct command* command) {
  while (command->in >= 0 && command->pending_size) {
    ssize_t done = write(command->in, command->pending, command->pending_size);
    if (done < 0 && errno == EAGAIN) return;
    if (done <= 0) return close_input(command);  // it reads no more
    command->pending_size -= (size_t)done;
    memmove(command->pending, command->pending + done, command->pending_size);
  }
  if (command->end_input) close_input(command);
}

static void exit_frame(uint32_t id, uint32_t status) {
  send_frame(id, EXIT, &status, sizeof(status));
}

static void refuse(uint32_t id, const char* why) {
  send_frame(id, ERRORS, why, (uint32_t)strlen(why));
  send_frame(id, OUTPUT_END, NULL, 0);
  send_frame(id, ERRORS_END, NULL, 0);
  exit_frame(id, EXEC_FAILED << 8);
}

/* Payload: strings that end with NUL: directory, number of variables, variables NAME=VALUE, arguments. */
static void start(uint32_t id, char* payload, uint32_t length) {
  char* words[4096];
  int count = 0, variables, pipes[3][2];
  struct command* command = NULL;

  for (uint32_t at = 0; at < length && count < 4095; at += (uint32_t)strlen(payload + at) + 1)
    words[count++] = payload + at;
  words[count] = NULL;
  variables = count > 1 ? atoi(words[1]) : 0;
  if (count < variables + 3) return refuse(id, "guest: no command\n");
  for (int i = 0; i < MAX_COMMANDS && !command; i++)
    if (!commands[i].used) command = &commands[i];
  if (!command) return refuse(id, "guest: too many commands at the same time\n");
  for (int i = 0; i < 3; i++)
    if (pipe2(pipes[i], O_CLOEXEC)) die("pipe: %s", strerror(errno));
  pid_t pid = fork();
  if (pid < 0) die("fork: %s", strerror(errno));
  if (!pid) {
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    signal(SIGPIPE, SIG_DFL);
    setsid();
    dup2(pipes[0][0], 0);
    dup2(pipes[1][1], 1);
    dup2(pipes[2][1], 2);
    for (int i = 0; i < variables; i++) putenv(words[2 + i]);
    if (chdir(words[0])) {
      fprintf(stderr, "guest: %s: %s\n", words[0], strerror(errno));
      _exit(EXEC_FAILED);
    }
    execvp(words[2 + variables], words + 2 + variables);
    fprintf(stderr, "guest: %s: %s\n", words[2 + variables], strerror(errno));
    _exit(EXEC_FAILED);
  }
  close(pipes[0][0]);
  close(pipes[1][1]);
  close(pipes[2][1]);
  for (int i = 0; i < 3; i++) {
    int fd = pipes[i][i ? 0 : 1];
    fcntl(fd, F_SETFL, O_NONBLOCK);
  }
  *command = (struct command){
      .id = id, .pid = pid, .in = pipes[0][1], .out = pipes[1][0], .err = pipes[2][0], .used = 1};
}

static void receive(const struct header* header, char* payload) {
  struct command* command = find(header->id);

  if (header->type == RUN) return start(header->id, payload, header->length);
  if (!command) return;
  if (header->type == INPUT && command->in >= 0) {
    command->pending = realloc(command->pending, command->pending_size + header->length);
    if (!command->pending) die("no memory for input");
    memcpy(command->pending + command->pending_size, payload, header->length);
    command->pending_size += header->length;
    feed(command);
  } else if (header->type == INPUT_END) {
    command->end_input = 1;
    feed(command);
  } else if (header->type == SIGNAL && header->length == 4 && command->pid) {
    uint32_t number;
    memcpy(&number, payload, sizeof(number));
    kill(-command->pid, (int)number);
  }
}

static void read_host(void) {
  static char* buffer;
  static size_t size;
  char chunk[CHUNK];

  for (ssize_t got; (got = read(port, chunk, sizeof(chunk))) > 0;) {
    buffer = realloc(buffer, size + (size_t)got);
    if (!buffer) die("no memory for what the host says");
    memcpy(buffer + size, chunk, (size_t)got);
    size += (size_t)got;
  }
  size_t at = 0;
  while (size - at >= sizeof(struct header)) {
    struct header header;
    memcpy(&header, buffer + at, sizeof(header));
    if (header.length > MAX_FRAME) die("the host sends a frame of %u bytes", header.length);
    if (size - at < sizeof(header) + header.length) break;
    receive(&header, buffer + at + sizeof(header));
    at += sizeof(header) + header.length;
  }
  size -= at;
  memmove(buffer, buffer + at, size);
}

/* Passes on what a command said; at its end, or the end of all that have its pipe, says so. */
static void drain(struct command* command, int* fd, uint32_t type, uint32_t end_type) {
  char chunk[CHUNK];
  ssize_t got = read(*fd, chunk, sizeof(chunk));

  if (got > 0) return send_frame(command->id, type, chunk, (uint32_t)got);
  if (got < 0 && (errno == EAGAIN || errno == EINTR)) return;
  close(*fd);
  *fd = -1;
  send_frame(command->id, end_type, NULL, 0);
  release_if_done(command);
}

static void reap(void) {
  int status;

  for (pid_t pid; (pid = waitpid(-1, &status, WNOHANG)) > 0;)
    for (int i = 0; i < MAX_COMMANDS; i++)
      if (commands[i].used && commands[i].pid == pid) {
        commands[i].pid = 0;
        exit_frame(commands[i].id, (uint32_t)status);
        release_if_done(&commands[i]);
      }
}

void serve(const char* port_name) {
  static struct pollfd polled[2 + 3 * MAX_COMMANDS];
  sigset_t child;

  signal(SIGPIPE, SIG_IGN);
  sigemptyset(&child);
  sigaddset(&child, SIGCHLD);
  sigprocmask(SIG_BLOCK, &child, NULL);
  int signals = signalfd(-1, &child, SFD_CLOEXEC | SFD_NONBLOCK);
  open_port(port_name);
  greet();
  for (;;) {
    int count = 2;
    polled[0] = (struct pollfd){.fd = port, .events = POLLIN};
    polled[1] = (struct pollfd){.fd = signals, .events = POLLIN};
    for (int i = 0; i < MAX_COMMANDS; i++) {
      struct command* each = &commands[i];
      if (!each->used) continue;
      if (each->out >= 0) polled[count++] = (struct pollfd){.fd = each->out, .events = POLLIN};
      if (each->err >= 0) polled[count++] = (struct pollfd){.fd = each->err, .events = POLLIN};
      if (each->in >= 0 && each->pending_size)
        polled[count++] = (struct pollfd){.fd = each->in, .events = POLLOUT};
    }
    if (poll(polled, (nfds_t)count, -1) < 0) continue;
    for (int i = 0; i < MAX_COMMANDS; i++) {
      struct command* each = &commands[i];
      if (each->used && each->out >= 0) drain(each, &each->out, OUTPUT, OUTPUT_END);
      if (each->used && each->err >= 0) drain(each, &each->err, ERRORS, ERRORS_END);
      if (each->used && each->in >= 0 && each->pending_size) feed(each);
    }
    struct signalfd_siginfo info;
    while (read(signals, &info, sizeof(info)) > 0) {
    }
    reap();
    read_host();
  }
}
