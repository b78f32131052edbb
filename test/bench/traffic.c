// Load of the benchmark: ping-pong, connection rate, and many idle connections. One program, the first
// argument says which part it plays. Addresses are IPv4 or IPv6 literals. Results are one JSON object on
// standard output.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netdb.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

static void die(const char* what) {
  fprintf(stderr, "%s: %s\n", what, strerror(errno));
  exit(1);
}

static uint64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static struct addrinfo* resolve(const char* host, const char* port) {
  struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_NUMERICHOST | AI_NUMERICSERV};
  struct addrinfo* result = NULL;
  int error = getaddrinfo(host, port, &hints, &result);
  if (error != 0) {
    fprintf(stderr, "%s %s: %s\n", host, port, gai_strerror(error));
    exit(1);
  }
  return result;
}

static int dial(const struct addrinfo* to) {
  int fd = socket(to->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (fd < 0) return -1;
  int on = 1;
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  if (connect(fd, to->ai_addr, to->ai_addrlen) != 0) {
    int error = errno;
    close(fd);
    errno = error;
    return -1;
  }
  return fd;
}

static int listen_on(int port) {
  int fd = socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (fd < 0) die("socket");
  int on = 1, off = 0;
  setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
  setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof off);
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  struct sockaddr_in6 address = {.sin6_family = AF_INET6, .sin6_port = htons((uint16_t)port)};
  if (bind(fd, (struct sockaddr*)&address, sizeof address) != 0) die("bind");
  if (listen(fd, 4096) != 0) die("listen");
  return fd;
}

// Echoes every byte on every connection; also where the idle connections end.
static _Noreturn void serve_echo(int port) {
  int listener = listen_on(port);
  int loop = epoll_create1(EPOLL_CLOEXEC);
  struct epoll_event event = {.events = EPOLLIN, .data.fd = listener};
  epoll_ctl(loop, EPOLL_CTL_ADD, listener, &event);
  struct epoll_event ready[256];
  char buffer[4096];
  for (;;) {
    int n = epoll_wait(loop, ready, 256, -1);
    for (int i = 0; i < n; i++) {
      int fd = ready[i].data.fd;
      if (fd == listener) {
        int accepted = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
        if (accepted < 0) continue;
        event = (struct epoll_event){.events = EPOLLIN, .data.fd = accepted};
        epoll_ctl(loop, EPOLL_CTL_ADD, accepted, &event);
        continue;
      }
      ssize_t got = read(fd, buffer, sizeof buffer);
      if (got <= 0 || write(fd, buffer, (size_t)got) != got) close(fd);
    }
  }
}

// One byte in, one byte out, then this side closes first, so that no client port waits.
static _Noreturn void* close_first(void* argument) {
  int listener = *(int*)argument;
  for (;;) {
    int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
    if (fd < 0) continue;
    struct timeval limit = {.tv_sec = 5};
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    char byte;
    if (read(fd, &byte, 1) == 1 && write(fd, &byte, 1) != 1) perror("write");
    close(fd);
  }
}

static _Noreturn void serve_close_first(int port, int threads) {
  int listener = listen_on(port);
  for (int i = 1; i < threads; i++) {
    pthread_t thread;
    if (pthread_create(&thread, NULL, close_first, &listener) != 0) die("pthread_create");
  }
  close_first(&listener);
}

static int compare(const void* a, const void* b) {
  uint32_t x = *(const uint32_t*)a, y = *(const uint32_t*)b;
  return x < y ? -1 : x > y;
}

static int ping(const struct addrinfo* to, double seconds) {
  int fd = dial(to);
  if (fd < 0) die("connect");
  size_t capacity = 1 << 22, count = 0;
  uint32_t* times = malloc(capacity * sizeof *times);
  if (times == NULL) die("malloc");
  char byte = 'x';
  for (int i = 0; i < 200; i++)
    if (write(fd, &byte, 1) != 1 || read(fd, &byte, 1) != 1) die("warm-up");
  uint64_t end = now_ns() + (uint64_t)(seconds * 1e9);
  for (uint64_t before = now_ns(); before < end && count < capacity;) {
    if (write(fd, &byte, 1) != 1 || read(fd, &byte, 1) != 1) die("ping");
    uint64_t after = now_ns();
    times[count++] = (uint32_t)(after - before);
    before = after;
  }
  qsort(times, count, sizeof *times, compare);
  printf("{\"count\": %zu, \"p50_us\": %.2f, \"p99_us\": %.2f}\n", count, times[count / 2] / 1e3,
         times[count * 99 / 100] / 1e3);
  return 0;
}

struct rate {
  const struct addrinfo* to;
  uint64_t end;
  uint64_t done, failed;
  int error;
};

static void* connect_often(void* argument) {
  struct rate* rate = argument;
  while (now_ns() < rate->end) {
    int fd = dial(rate->to);
    char byte = 'x';
    // The last read waits for the server's close.
    if (fd >= 0 && write(fd, &byte, 1) == 1 && read(fd, &byte, 1) == 1 && read(fd, &byte, 1) == 0) {
      rate->done++;
    } else {
      rate->error = errno;
      rate->failed++;
    }
    if (fd >= 0) close(fd);
  }
  return NULL;
}

static int connection_rate(const struct addrinfo* to, double seconds, int clients) {
  struct rate* rates = calloc((size_t)clients, sizeof *rates);
  pthread_t* threads = calloc((size_t)clients, sizeof *threads);
  if (rates == NULL || threads == NULL) die("calloc");
  uint64_t start = now_ns();
  for (int i = 0; i < clients; i++) {
    rates[i] = (struct rate){.to = to, .end = start + (uint64_t)(seconds * 1e9)};
    if (pthread_create(&threads[i], NULL, connect_often, &rates[i]) != 0) die("pthread_create");
  }
  uint64_t done = 0, failed = 0;
  int error = 0;
  for (int i = 0; i < clients; i++) {
    pthread_join(threads[i], NULL);
    done += rates[i].done;
    failed += rates[i].failed;
    if (rates[i].error != 0) error = rates[i].error;
  }
  double elapsed = (double)(now_ns() - start) / 1e9;
  printf("{\"per_second\": %.1f, \"done\": %llu, \"failed\": %llu, \"error\": \"%s\"}\n",
         (double)done / elapsed, (unsigned long long)done, (unsigned long long)failed,
         error == 0 ? "" : strerror(error));
  return 0;
}

// Opens connections, exchanges one byte on each, prints how many are open, and holds them until it is killed.
static int hold(const struct addrinfo* to, int count) {
  int* fds = calloc((size_t)count, sizeof *fds);
  if (fds == NULL) die("calloc");
  int opened = 0;
  for (; opened < count; opened++) {
    char byte = 'x';
    fds[opened] = dial(to);
    if (fds[opened] < 0 || write(fds[opened], &byte, 1) != 1 || read(fds[opened], &byte, 1) != 1) {
      fprintf(stderr, "connection %d: %s\n", opened, strerror(errno));
      break;
    }
  }
  printf("{\"opened\": %d}\n", opened);
  fflush(stdout);
  pause();
  return 0;
}

int main(int argc, char** argv) {
  signal(SIGPIPE, SIG_IGN);
  struct rlimit limit;
  if (getrlimit(RLIMIT_NOFILE, &limit) == 0) {
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
  }
  const char* part = argc > 1 ? argv[1] : "";
  if (strcmp(part, "echo") == 0 && argc == 3) serve_echo(atoi(argv[2]));
  if (strcmp(part, "close-first") == 0 && argc == 4) serve_close_first(atoi(argv[2]), atoi(argv[3]));
  if (strcmp(part, "ping") == 0 && argc == 5) return ping(resolve(argv[2], argv[3]), atof(argv[4]));
  if (strcmp(part, "rate") == 0 && argc == 6)
    return connection_rate(resolve(argv[2], argv[3]), atof(argv[4]), atoi(argv[5]));
  if (strcmp(part, "hold") == 0 && argc == 5) return hold(resolve(argv[2], argv[3]), atoi(argv[4]));
  fprintf(stderr,
          "usage: traffic echo PORT | close-first PORT THREADS | ping HOST PORT SECONDS | rate HOST PORT "
          "SECONDS CLIENTS | "
          "hold HOST PORT COUNT\n");
  return 2;
}
