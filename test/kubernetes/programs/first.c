/* A container that connects with its first instruction and takes connections with its second: first ADDRESS
 * PORT TEXT. What happened is said on standard output, a line each: `tried ERRNO`, `connected MICROSECONDS
 * TRIES`, `accepted ADDRESS`. */
#include <arpa/inet.h>
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define LISTEN_PORT 9000

static long microseconds(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * 1000000 + now.tv_nsec / 1000;
}

static void accept_one(int listener) {
  struct sockaddr_in peer;
  socklen_t size = sizeof(peer);
  char text[INET_ADDRSTRLEN], data[256];
  int fd = accept(listener, (struct sockaddr*)&peer, &size);

  if (fd < 0) return;
  inet_ntop(AF_INET, &peer.sin_addr, text, sizeof(text));
  printf("accepted %s\n", text);
  if (read(fd, data, sizeof(data)) < 0) printf("reset by %s\n", text);
  close(fd);
}

int main(int argc, char** argv) {
  struct sockaddr_in to = {.sin_family = AF_INET},
                     any = {.sin_family = AF_INET, .sin_port = htons(LISTEN_PORT)};
  int listener = -1, tries = 0, last = 0, connected = 0;
  long started = microseconds();

  if (argc < 4) return 2;
  setvbuf(stdout, 0, _IOLBF, 0);
  to.sin_port = htons(atoi(argv[2]));
  inet_pton(AF_INET, argv[1], &to.sin_addr);
  for (;;) {
    if (!connected) {
      int fd = socket(AF_INET, SOCK_STREAM, 0);

      tries++;
      if (fd >= 0 && connect(fd, (struct sockaddr*)&to, sizeof(to)) == 0 &&
          write(fd, argv[3], strlen(argv[3])) > 0) {
        printf("connected %ld %d\n", microseconds() - started, tries);
        connected = 1;
      } else {
        if (errno != last) printf("tried %d %s\n", errno, strerror(errno));
        last = errno;
        if (fd >= 0) close(fd);
      }
    }
    if (listener < 0) {
      int on = 1;

      listener = socket(AF_INET, SOCK_STREAM, 0);
      if (listener >= 0) {
        setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
        if (bind(listener, (struct sockaddr*)&any, sizeof(any)) || listen(listener, 128)) {
          close(listener);
          listener = -1;
        } else {
          printf("listens %ld\n", microseconds() - started);
        }
      }
    }
    if (listener >= 0) {
      struct pollfd waited = {.fd = listener, .events = POLLIN};

      if (poll(&waited, 1, connected ? 100 : 1) > 0) accept_one(listener);
    } else {
      usleep(1000);
    }
  }
}
