// Peers for the capture tests: a stand-in at the proxy's place that binds the three listeners, applications,
// and an attacker. Each run does one thing and prints JSON lines.
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <linux/io_uring.h>
#include <net/if.h>
#include <netinet/ip.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#ifndef IPPROTO_MPTCP
#define IPPROTO_MPTCP 262
#endif
#define ORIGINAL_DST 80

static void die(const char* what) {
  printf("{\"ok\":false,\"step\":\"%s\",\"errno\":%d}\n", what, errno);
  exit(1);
}

// "1.2.3.4", "fd00::1" or "::ffff:1.2.3.4" (which makes an AF_INET6 address).
static socklen_t parse(struct sockaddr_storage* to, const char* ip, int port) {
  struct sockaddr_in* four = (void*)to;
  struct sockaddr_in6* six = (void*)to;
  memset(to, 0, sizeof(*to));
  if (inet_pton(AF_INET, ip, &four->sin_addr) == 1) {
    four->sin_family = AF_INET;
    four->sin_port = htons(port);
    return sizeof(*four);
  }
  if (inet_pton(AF_INET6, ip, &six->sin6_addr) != 1) {
    errno = EINVAL;
    die("address");
  }
  six->sin6_family = AF_INET6;
  six->sin6_port = htons(port);
  return sizeof(*six);
}

static const char* show(const void* address) {
  static char text[4][80];
  static int turn;
  char ip[INET6_ADDRSTRLEN] = "?";
  const struct sockaddr_in* four = address;
  const struct sockaddr_in6* six = address;
  char* out = text[turn++ % 4];
  if (four->sin_family == AF_INET)
    inet_ntop(AF_INET, &four->sin_addr, ip, sizeof(ip));
  else if (four->sin_family == AF_INET6)
    inet_ntop(AF_INET6, &six->sin6_addr, ip, sizeof(ip));
  snprintf(out, sizeof(text[0]), four->sin_family == AF_INET6 ? "[%s]:%d" : "%s:%d", ip,
           ntohs(four->sin_port));
  return out;
}

static const char* local_name(int fd) {
  struct sockaddr_storage a = {0};
  socklen_t n = sizeof(a);
  return getsockname(fd, (void*)&a, &n) ? "" : show(&a);
}

static const char* peer_name(int fd) {
  struct sockaddr_storage a = {0};
  socklen_t n = sizeof(a);
  return getpeername(fd, (void*)&a, &n) ? "" : show(&a);
}

static const char* original_destination(int fd) {
  struct sockaddr_storage a = {0};
  socklen_t n = sizeof(a);
  if (!getsockopt(fd, SOL_IP, ORIGINAL_DST, &a, &n)) return show(&a);
  n = sizeof(a);
  if (!getsockopt(fd, SOL_IPV6, ORIGINAL_DST, &a, &n)) return show(&a);
  return "";
}

static int listen_on(const char* ip, int port, int reuse_port) {
  struct sockaddr_storage a;
  socklen_t n = parse(&a, ip, port);
  int protocol = getenv("MPTCP") ? IPPROTO_MPTCP : 0;
  int one = 1, zero = 0, fd = socket(a.ss_family, SOCK_STREAM | SOCK_CLOEXEC, protocol);
  if (fd < 0) die("socket");
  setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
  if (reuse_port) setsockopt(fd, SOL_SOCKET, SO_REUSEPORT, &one, sizeof(one));
  if (a.ss_family == AF_INET6) setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &zero, sizeof(zero));
  if (bind(fd, (void*)&a, n)) die("bind");
  if (listen(fd, 1024)) die("listen");
  return fd;
}

// How long a connection may take to come about.
static int connect_seconds(void) {
  const char* seconds = getenv("CONNECT_SECONDS");
  return seconds ? atoi(seconds) : 2;
}

static void read_answer(int fd, char* answer, size_t size) {
  struct pollfd p = {fd, POLLIN, 0};
  ssize_t n = 0;
  if (poll(&p, 1, 1000 + 1000 * connect_seconds()) > 0) n = read(fd, answer, size - 1);
  answer[n > 0 ? n : 0] = 0;
  answer[strcspn(answer, "\n")] = 0;
}

// Dials as the proxy does: with the client's address (a claim) or, without one, plainly.
static void dial(const char* client, int client_port, const char* ip, int port) {
  struct sockaddr_storage to, from;
  socklen_t n = parse(&to, ip, port);
  int one = 1, fd = socket(to.ss_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
  char answer[256] = "";
  if (strcmp(client, "-")) {
    socklen_t m = parse(&from, client, client_port);
    if (to.ss_family == AF_INET6)
      setsockopt(fd, IPPROTO_IPV6, 75 /* IPV6_TRANSPARENT */, &one, sizeof(one));
    else
      setsockopt(fd, SOL_IP, IP_TRANSPARENT, &one, sizeof(one));
    setsockopt(fd, SOL_IP, IP_FREEBIND, &one, sizeof(one));
    setsockopt(fd, SOL_IP, IP_BIND_ADDRESS_NO_PORT, &one, sizeof(one));
    if (bind(fd, (void*)&from, m)) {
      printf("{\"dial\":{\"ok\":false,\"step\":\"bind\",\"errno\":%d}}\n", errno);
      close(fd);
      return;
    }
  }
  struct timeval timeout = {2, 0};
  setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &timeout, sizeof(timeout));
  if (connect(fd, (void*)&to, n)) {
    printf("{\"dial\":{\"ok\":false,\"step\":\"connect\",\"errno\":%d}}\n", errno);
  } else {
    if (write(fd, "hello\n", 6) < 0) perror("write");
    read_answer(fd, answer, sizeof(answer));
    printf("{\"dial\":{\"ok\":true,\"answer\":\"%s\"}}\n", answer);
  }
  close(fd);
}

// Never returns but at the end of standard input.
static int run_proxy(const char* netns, int workers, const char* any) {
  static const int ports[] = {15001, 15008, 15006};
  static const char* const roles[] = {"outbound", "hbone", "plaintext"};
  struct pollfd fds[64];
  int count = 1, fd = open(netns, O_RDONLY | O_CLOEXEC);
  char line[256];
  if (fd < 0 || setns(fd, CLONE_NEWNET)) die("setns");
  fds[0] = (struct pollfd){0, POLLIN, 0};
  printf("{\"ready\":[");
  for (int i = 0; i < 3 * workers; i++) {
    int listener = listen_on(any, ports[i % 3], 0);
    printf("%s\"%s\"", i ? "," : "", local_name(listener));
    fds[count++] = (struct pollfd){listener, POLLIN, 0};
  }
  printf("]}\n");
  fflush(stdout);
  for (;;) {
    if (poll(fds, count, -1) < 0) continue;
    if (fds[0].revents) {
      char client[64], ip[64];
      int client_port, port;
      if (!fgets(line, sizeof(line), stdin)) return 0;
      if (sscanf(line, "dial %63s %d %63s %d", client, &client_port, ip, &port) == 4)
        dial(client, client_port, ip, port);
      fflush(stdout);
    }
    for (int i = 1; i < count; i++) {
      if (!(fds[i].revents & POLLIN)) continue;
      int c = accept4(fds[i].fd, 0, 0, SOCK_CLOEXEC);
      if (c < 0) continue;
      const char *role = roles[(i - 1) % 3], *to = original_destination(c);
      printf("{\"accepted\":\"%s\",\"listener\":%d,\"original\":\"%s\",\"local\":\"%s\",\"peer\":\"%s\"}\n",
             role, i, to, local_name(c), peer_name(c));
      fflush(stdout);
      dprintf(c, "proxy %s %s\n", role, *to ? to : local_name(c));
      shutdown(c, SHUT_WR);
      // The client closes first; waiting for that here would let one connection hold up the others.
      static int kept[128];
      static int turn;
      if (kept[turn]) close(kept[turn]);
      kept[turn] = c;
      turn = (turn + 1) % 128;
    }
  }
}

// prober: a kubelet in small. For each line "ADDRESS PORT SOURCE_PORT TIMES" of standard input it connects
// that often, one after another, sends a line and reads to the end; "enter PATH" takes it to another
// namespace.
static int run_prober(void) {
  char line[256], ip[64], answer[256];
  int port, source, times, one = 1;
  printf("{\"ready\":true}\n");
  fflush(stdout);
  while (fgets(line, sizeof(line), stdin)) {
    line[strcspn(line, "\n")] = 0;
    if (!strncmp(line, "enter ", 6)) {
      int netns = open(line + 6, O_RDONLY | O_CLOEXEC);
      if (netns < 0 || setns(netns, CLONE_NEWNET)) die("setns");
      printf("{\"entered\":true}\n");
    } else if (sscanf(line, "%63s %d %d %d", ip, &port, &source, &times) == 4) {
      int good = 0, error = 0;
      answer[0] = 0;
      for (int i = 0; i < times; i++) {
        struct sockaddr_storage to, from;
        struct timeval timeout = {2, 0};
        socklen_t n = parse(&to, ip, port);
        int fd = socket(to.ss_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
        setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &timeout, sizeof(timeout));
        setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
        socklen_t m = parse(&from, to.ss_family == AF_INET6 ? "::" : "0.0.0.0", source);
        if (source && bind(fd, (void*)&from, m)) die("bind");
        if (connect(fd, (void*)&to, n)) {
          error = errno;
        } else {
          if (write(fd, "hello\n", 6) < 0) error = errno;
          read_answer(fd, answer, sizeof(answer));
          // Without TIME_WAIT, so that a source port can be used again at once.
          if (source) setsockopt(fd, SOL_SOCKET, SO_LINGER, &(struct linger){1, 0}, sizeof(struct linger));
          good += !strncmp(answer, "app ", 4);
        }
        close(fd);
      }
      printf("{\"direct\":%d,\"answer\":\"%s\",\"errno\":%d}\n", good, answer, error);
    }
    fflush(stdout);
  }
  return 0;
}

// hammer ADDRESS PORT MILLISECONDS: begins a connection every five milliseconds, each with a payload, until
// one is answered or the time is over.
static int run_hammer(const char* ip, int port, int milliseconds) {
  struct sockaddr_storage to;
  socklen_t n = parse(&to, ip, port);
  struct timespec start, now;
  char answer[256] = "";
  int tries = 0;
  printf("{\"ready\":true}\n");
  fflush(stdout);
  clock_gettime(CLOCK_MONOTONIC, &start);
  for (;;) {
    int fd = socket(to.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0), error = 0;
    socklen_t size = sizeof(error);
    tries++;
    connect(fd, (void*)&to, n);
    struct pollfd p = {fd, POLLOUT, 0};
    if (poll(&p, 1, 5) > 0 && !getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &size) && !error &&
        write(fd, "payload\n", 8) == 8) {
      read_answer(fd, answer, sizeof(answer));
      if (*answer) break;
    }
    close(fd);
    clock_gettime(CLOCK_MONOTONIC, &now);
    if ((now.tv_sec - start.tv_sec) * 1000 + (now.tv_nsec - start.tv_nsec) / 1000000 > milliseconds) break;
    if (error) usleep(1000);
  }
  printf("{\"tries\":%d,\"answer\":\"%s\"}\n", tries, answer);
  return 0;
}

static _Noreturn void run_server(const char* ip, int port, int reuse_port) {
  int fd = listen_on(ip, port, reuse_port);
  printf("{\"ready\":true}\n");
  fflush(stdout);
  for (;;) {
    struct sockaddr_storage a = {0};
    socklen_t n = sizeof(a);
    int c = accept(fd, (void*)&a, &n);
    if (c < 0) continue;
    printf("{\"accepted\":\"%s\",\"getpeername\":\"%s\",\"local\":\"%s\"}\n", show(&a), peer_name(c),
           local_name(c));
    fflush(stdout);
    dprintf(c, "app %s\n", show(&a));
    shutdown(c, SHUT_WR);
    char sink[512];
    struct pollfd p = {c, POLLIN, 0};
    ssize_t got;
    while (poll(&p, 1, 3000) > 0 && (got = read(c, sink, sizeof(sink) - 1)) > 0) {
      sink[got] = 0;
      sink[strcspn(sink, "\n")] = 0;
      if (!strcmp(sink, "payload")) printf("{\"got\":\"%s\"}\n", sink);
      fflush(stdout);
    }
    close(c);
  }
}

// IORING_OP_CONNECT with the bare system calls; returns -errno as the ring does.
static int uring_connect(int fd, struct sockaddr_storage* to, socklen_t n) {
  struct io_uring_params p = {0};
  int ring = (int)syscall(SYS_io_uring_setup, 4, &p);
  if (ring < 0) die("io_uring_setup");
  size_t sq_size = p.sq_off.array + p.sq_entries * sizeof(unsigned);
  size_t cq_size = p.cq_off.cqes + p.cq_entries * sizeof(struct io_uring_cqe);
  char* sq = mmap(0, sq_size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring, IORING_OFF_SQ_RING);
  char* cq = mmap(0, cq_size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring, IORING_OFF_CQ_RING);
  struct io_uring_sqe* sqes = mmap(0, p.sq_entries * sizeof(*sqes), PROT_READ | PROT_WRITE,
                                   MAP_SHARED | MAP_POPULATE, ring, IORING_OFF_SQES);
  memset(&sqes[0], 0, sizeof(sqes[0]));
  sqes[0].opcode = IORING_OP_CONNECT;
  sqes[0].flags = IOSQE_ASYNC;
  sqes[0].fd = fd;
  sqes[0].addr = (unsigned long)to;
  sqes[0].off = n;
  *(unsigned*)(sq + p.sq_off.array) = 0;
  __atomic_store_n((unsigned*)(sq + p.sq_off.tail), 1, __ATOMIC_RELEASE);
  if (syscall(SYS_io_uring_enter, ring, 1, 1, IORING_ENTER_GETEVENTS, 0, 0) < 0) die("io_uring_enter");
  struct io_uring_cqe* cqe = (void*)(cq + p.cq_off.cqes);
  return cqe->res;
}

// connect ADDRESS PORT [option[=value]]...: as applications do it in all their ways.
static int run_connect(int argc, char** argv) {
  struct sockaddr_storage to, other;
  socklen_t n = parse(&to, argv[2], atoi(argv[3])), m;
  int protocol = 0, fast_open = 0, non_blocking = 0, uring = 0, again = 0, one = 1, result, early = 0,
      deferred = 0, hold = 0;
  char answer[256] = "", early_peer[80] = "", before[80], *say = 0;
  for (int i = 4; i < argc; i++)
    if (!strcmp(argv[i], "mptcp")) protocol = IPPROTO_MPTCP;
  int fd = socket(to.ss_family, SOCK_STREAM | SOCK_CLOEXEC, protocol);
  if (fd < 0) die("socket");
  for (int i = 4; i < argc; i++) {
    char *option = argv[i], *value = strchr(option, '=');
    if (value) *value++ = 0;
    int number = value ? atoi(value) : 0;
    if (!strcmp(option, "nonblock")) non_blocking = 1;
    if (!strcmp(option, "uring")) uring = 1;
    if (!strcmp(option, "hold")) hold = 1;
    if (!strcmp(option, "again")) again = number;
    if (!strcmp(option, "say")) say = value;
    if (!strcmp(option, "fastopen")) fast_open = 1;
    if (!strcmp(option, "v6only")) setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &one, sizeof(one));
    if (!strcmp(option, "deferred")) {
      deferred = 1;
      if (setsockopt(fd, IPPROTO_TCP, TCP_FASTOPEN_CONNECT, &one, sizeof(one))) die("TCP_FASTOPEN_CONNECT");
    }
    if (!strcmp(option, "mark") && setsockopt(fd, SOL_SOCKET, SO_MARK, &number, sizeof(number)))
      die("SO_MARK");
    if (!strcmp(option, "device") && setsockopt(fd, SOL_SOCKET, SO_BINDTODEVICE, value, strlen(value)))
      die("device");
    if (!strcmp(option, "setuid") && (setgid(number) || setuid(number))) die("setuid");
    if (!strcmp(option, "cgroup")) {
      int procs = open(value, O_WRONLY);
      if (procs < 0 || dprintf(procs, "0\n") < 0) die("cgroup");
      close(procs);
    }
    if (!strcmp(option, "bind")) {
      char* port = strchr(value, '/');
      *port++ = 0;
      m = parse(&other, value, atoi(port));
      setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
      if (bind(fd, (void*)&other, m)) die("bind");
    }
  }
  struct timeval timeout = {connect_seconds(), 0};
  setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &timeout, sizeof(timeout));
  if (again) {
    // First to an own listener, which is not captured, then apart, then to the destination on the same
    // socket.
    m = parse(&other, to.ss_family == AF_INET ? "127.0.0.1" : "::1", again);
    if (connect(fd, (void*)&other, m)) die("first connect");
    struct sockaddr nothing = {.sa_family = AF_UNSPEC};
    if (connect(fd, &nothing, sizeof(nothing))) die("AF_UNSPEC");
  }
  if (non_blocking) fcntl(fd, F_SETFL, O_NONBLOCK);
  if (fast_open)
    result = sendto(fd, "data\n", 5, MSG_FASTOPEN, (void*)&to, n) < 0 ? -1 : 0;
  else if (uring) {
    result = uring_connect(fd, &to, n);
    if (result < 0) {
      errno = -result;
      result = -1;
    }
  } else {
    result = connect(fd, (void*)&to, n);
  }
  if (result && errno == EINPROGRESS && non_blocking) {
    snprintf(early_peer, sizeof(early_peer), "%s", local_name(fd));
    early = 1;
    struct pollfd p = {fd, POLLOUT, 0};
    poll(&p, 1, 1000 * connect_seconds());
    socklen_t size = sizeof(errno);
    int error = 0;
    getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &size);
    fcntl(fd, F_SETFL, 0);
    result = error ? -1 : 0;
    errno = error;
  }
  if (result) die("connect");
  if (deferred) {
    snprintf(early_peer, sizeof(early_peer), "%s", peer_name(fd));
    early = 1;
    if (write(fd, "data\n", 5) < 0) die("write");
  }
  snprintf(before, sizeof(before), "%s", local_name(fd));
  if (hold) {
    // Sends what standard input says, for as long as it is let.
    printf("{\"connected\":true}\n");
    fflush(stdout);
    while (fgets(answer, sizeof(answer), stdin))
      if (write(fd, answer, strlen(answer)) < 0) die("write");
    return 0;
  }
  if (say && dprintf(fd, "%s\n", say) < 0) die("write");
  read_answer(fd, answer, sizeof(answer));
  printf("{\"ok\":true,\"local\":\"%s\",\"peer\":\"%s\",\"early\":\"%s\",\"answer\":\"%s\"}\n", before,
         peer_name(fd), early ? early_peer : "", answer);
  return 0;
}

static unsigned short checksum(const void* data, size_t size, unsigned sum) {
  const unsigned short* word = data;
  for (size_t i = 0; i < size / 2; i++) sum += word[i];
  while (sum >> 16) sum = (sum & 0xffff) + (sum >> 16);
  return ~sum;
}

// raw METHOD SOURCE DESTINATION PORT DEVICE GATEWAY_MAC: three SYNs made by hand.
static int run_raw(char** argv) {
  struct {
    struct iphdr ip;
    struct tcphdr tcp;
  } packet = {0};
  unsigned char frame[14 + sizeof(packet)];
  struct sockaddr_in to = {.sin_family = AF_INET};
  int one = 1, sent = 0;
  inet_pton(AF_INET, argv[3], &packet.ip.saddr);
  inet_pton(AF_INET, argv[4], &packet.ip.daddr);
  packet.ip.version = 4;
  packet.ip.ihl = 5;
  packet.ip.ttl = 64;
  packet.ip.protocol = IPPROTO_TCP;
  packet.ip.tot_len = htons(sizeof(packet));
  packet.tcp.source = htons(40001);
  packet.tcp.dest = htons(atoi(argv[5]));
  packet.tcp.doff = 5;
  packet.tcp.syn = 1;
  packet.tcp.window = htons(1000);
  packet.ip.check = checksum(&packet.ip, sizeof(packet.ip), 0);
  unsigned pseudo = (packet.ip.saddr & 0xffff) + (packet.ip.saddr >> 16) + (packet.ip.daddr & 0xffff) +
                    (packet.ip.daddr >> 16) + htons(IPPROTO_TCP) + htons(sizeof(packet.tcp));
  packet.tcp.check = checksum(&packet.tcp, sizeof(packet.tcp), pseudo);
  to.sin_addr.s_addr = packet.ip.daddr;
  for (int i = 0; i < 3; i++) {
    if (!strcmp(argv[2], "tcp")) {
      int fd = socket(AF_INET, SOCK_RAW, IPPROTO_TCP);
      sent += sendto(fd, &packet.tcp, sizeof(packet.tcp), 0, (void*)&to, sizeof(to)) > 0;
    } else if (!strcmp(argv[2], "header")) {
      int fd = socket(AF_INET, SOCK_RAW, IPPROTO_RAW);
      sent += sendto(fd, &packet, sizeof(packet), 0, (void*)&to, sizeof(to)) > 0;
    } else {
      int fd = socket(AF_PACKET, SOCK_RAW, htons(ETH_P_IP));
      struct sockaddr_ll link = {.sll_family = AF_PACKET, .sll_protocol = htons(ETH_P_IP), .sll_halen = 6};
      struct ifreq request = {0};
      unsigned mac[6];
      link.sll_ifindex = if_nametoindex(argv[6]);
      snprintf(request.ifr_name, sizeof(request.ifr_name), "%s", argv[6]);
      ioctl(fd, SIOCGIFHWADDR, &request);
      sscanf(argv[7], "%x:%x:%x:%x:%x:%x", &mac[0], &mac[1], &mac[2], &mac[3], &mac[4], &mac[5]);
      for (int j = 0; j < 6; j++) frame[j] = mac[j];
      memcpy(frame + 6, request.ifr_hwaddr.sa_data, 6);
      frame[12] = 8;
      frame[13] = 0;
      memcpy(frame + 14, &packet, sizeof(packet));
      if (!strcmp(argv[2], "bypass"))
        setsockopt(fd, SOL_PACKET, 20 /* PACKET_QDISC_BYPASS */, &one, sizeof(one));
      sent += sendto(fd, frame, sizeof(frame), 0, (void*)&link, sizeof(link)) > 0;
    }
  }
  printf("{\"ok\":true,\"sent\":%d}\n", sent);
  return 0;
}

// sniff PORT MILLISECONDS [COUNT]: counts TCP packets for the port that arrive in this namespace in that
// time, or until there are so many.
static int run_sniff(int port, int milliseconds, int enough) {
  int fd = socket(AF_PACKET, SOCK_DGRAM, htons(ETH_P_IP)), seen = 0;
  struct timespec start, now;
  unsigned char packet[2048];
  if (fd < 0) die("socket");
  printf("{\"ready\":true}\n");
  fflush(stdout);
  clock_gettime(CLOCK_MONOTONIC, &start);
  while (seen != enough) {
    clock_gettime(CLOCK_MONOTONIC, &now);
    long left = milliseconds - (now.tv_sec - start.tv_sec) * 1000 - (now.tv_nsec - start.tv_nsec) / 1000000;
    struct pollfd p = {fd, POLLIN, 0};
    if (left <= 0 || poll(&p, 1, left) <= 0) break;
    ssize_t n = recv(fd, packet, sizeof(packet), 0);
    struct iphdr* ip = (void*)packet;
    struct tcphdr* tcp = (void*)(packet + ip->ihl * 4);
    if (n >= 40 && ip->protocol == IPPROTO_TCP && ntohs(tcp->dest) == port) seen++;
  }
  printf("{\"seen\":%d}\n", seen);
  return 0;
}

// flood ADDRESS COUNT: as many connects to different destinations as it is let, without waiting for any;
// holds them until the end of standard input. ADDRESS is the first of the destinations. Several processes
// share the work, because the number of descriptors is bounded for each.
static int run_flood(const char* address, int count) {
  enum { kEach = 16000 };
  struct rlimit files = {kEach + 64, kEach + 64};
  int pipes[2], sums[3] = {0}, workers = (count + kEach - 1) / kEach;
  if (setrlimit(RLIMIT_NOFILE, &files) || pipe(pipes)) die("setrlimit");
  for (int worker = 0; worker < workers; worker++) {
    if (fork()) continue;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    int results[3] = {0};  // begun, refused, failed
    for (int i = worker * kEach; i < count && i < (worker + 1) * kEach; i++) {
      struct sockaddr_storage to;
      socklen_t n = parse(&to, address, 1 + i % 50000);
      int fd = socket(to.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
      unsigned char* last = to.ss_family == AF_INET ? (void*)&((struct sockaddr_in*)&to)->sin_addr
                                                    : &((struct sockaddr_in6*)&to)->sin6_addr.s6_addr[12];
      last[1] += i >> 16;
      last[2] += i >> 8;
      last[3] += i;
      int error = connect(fd, (void*)&to, n) ? errno : EINPROGRESS;
      results[error == EINPROGRESS ? 0 : error == EPERM ? 1 : 2]++;
      if (error != EINPROGRESS) close(fd);
    }
    if (write(pipes[1], results, sizeof(results)) < 0) return 1;
    for (;;) pause();
  }
  for (int worker = 0; worker < workers; worker++) {
    int results[3];
    if (read(pipes[0], results, sizeof(results)) != sizeof(results)) die("read");
    for (int i = 0; i < 3; i++) sums[i] += results[i];
  }
  printf("{\"begun\":%d,\"refused\":%d,\"failed\":%d}\n", sums[0], sums[1], sums[2]);
  fflush(stdout);
  while (getchar() != EOF) continue;
  return 0;
}

// many ADDRESS PORT COUNT: opens connections, then for each line of standard input sends one byte on each and
// waits for its echo; prints how many came back.
static int run_many(const char* address, int port, int count) {
  struct rlimit files = {count + 64, count + 64};
  int* fds = calloc(count, sizeof(int));
  struct timeval timeout = {8, 0};
  setrlimit(RLIMIT_NOFILE, &files);
  for (int i = 0; i < count; i++) {
    struct sockaddr_storage to;
    socklen_t n = parse(&to, address, port);
    fds[i] = socket(to.ss_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    setsockopt(fds[i], SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof(timeout));
    if (connect(fds[i], (void*)&to, n)) die("connect");
  }
  printf("{\"connected\":%d}\n", count);
  fflush(stdout);
  for (int c = getchar(); c != EOF; c = getchar()) {
    int echoed = 0;
    char byte = 'x';
    for (int i = 0; i < count; i++)
      if (send(fds[i], &byte, 1, MSG_NOSIGNAL) != 1) fds[i] = -1;
    for (int i = 0; i < count; i++) echoed += fds[i] >= 0 && recv(fds[i], &byte, 1, 0) == 1;
    printf("{\"echoed\":%d}\n", echoed);
    fflush(stdout);
  }
  return 0;
}

// echo ADDRESS PORT: gives every connection back what it sends.
static _Noreturn void run_echo(const char* ip, int port) {
  static struct pollfd fds[8192];
  int count = 1;
  struct rlimit files = {8300, 8300};
  setrlimit(RLIMIT_NOFILE, &files);
  fds[0] = (struct pollfd){listen_on(ip, port, 0), POLLIN, 0};
  printf("{\"ready\":true}\n");
  fflush(stdout);
  for (;;) {
    char data[512];
    poll(fds, count, -1);
    if (fds[0].revents && count < 8192) {
      int c = accept4(fds[0].fd, 0, 0, SOCK_CLOEXEC);
      if (c >= 0) fds[count++] = (struct pollfd){c, POLLIN, 0};
    }
    for (int i = 1; i < count; i++) {
      if (!fds[i].revents) continue;
      ssize_t n = recv(fds[i].fd, data, sizeof(data), MSG_DONTWAIT);
      if (n > 0) send(fds[i].fd, data, n, MSG_NOSIGNAL);
      if (n > 0 || (n < 0 && errno == EAGAIN)) continue;
      close(fds[i].fd);
      fds[i--] = fds[--count];
    }
  }
}

// tcx INTERFACE: another program of the kind that network plugins attach: it accepts every packet.
static int run_tcx(const char* interface) {
  struct bpf_insn accept[] = {{.code = BPF_ALU64 | BPF_MOV | BPF_K, .imm = 0}, {.code = BPF_JMP | BPF_EXIT}};
  union bpf_attr attr = {.prog_type = BPF_PROG_TYPE_SCHED_CLS};
  attr.insns = (unsigned long)accept;
  attr.insn_cnt = 2;
  attr.license = (unsigned long)"GPL";
  int program = (int)syscall(SYS_bpf, BPF_PROG_LOAD, &attr, sizeof(attr));
  if (program < 0) die("BPF_PROG_LOAD");
  memset(&attr, 0, sizeof(attr));
  attr.link_create.prog_fd = program;
  attr.link_create.target_ifindex = if_nametoindex(interface);
  attr.link_create.attach_type = 46;  // BPF_TCX_INGRESS
  if (syscall(SYS_bpf, BPF_LINK_CREATE, &attr, sizeof(attr)) < 0) die("BPF_LINK_CREATE");
  printf("{\"ready\":true}\n");
  fflush(stdout);
  while (getchar() != EOF) continue;
  return 0;
}

int main(int argc, char** argv) {
  if (argc >= 4 && !strcmp(argv[1], "proxy"))
    return run_proxy(argv[2], atoi(argv[3]), argc > 4 ? argv[4] : "::");
  if (argc >= 5 && !strcmp(argv[1], "hammer")) return run_hammer(argv[2], atoi(argv[3]), atoi(argv[4]));
  if (argc >= 2 && !strcmp(argv[1], "prober")) return run_prober();
  if (argc >= 4 && !strcmp(argv[1], "serve")) run_server(argv[2], atoi(argv[3]), argc > 4);
  if (argc >= 4 && !strcmp(argv[1], "connect")) return run_connect(argc, argv);
  if (argc >= 8 && !strcmp(argv[1], "raw")) return run_raw(argv);
  if (argc >= 4 && !strcmp(argv[1], "sniff"))
    return run_sniff(atoi(argv[2]), atoi(argv[3]), argc > 4 ? atoi(argv[4]) : -1);
  if (argc >= 4 && !strcmp(argv[1], "flood")) return run_flood(argv[2], atoi(argv[3]));
  if (argc >= 3 && !strcmp(argv[1], "tcx")) return run_tcx(argv[2]);
  if (argc >= 5 && !strcmp(argv[1], "many")) return run_many(argv[2], atoi(argv[3]), atoi(argv[4]));
  if (argc >= 4 && !strcmp(argv[1], "echo")) run_echo(argv[2], atoi(argv[3]));
  fprintf(stderr, "peer: see the source for what can be done\n");
  return 2;
}
