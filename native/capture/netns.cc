// setns on dedicated threads, NS_GET_NSTYPE, SO_NETNS_COOKIE, getifaddrs.
#include "netns.h"

#include <fcntl.h>
#include <ifaddrs.h>
#include <linux/nsfs.h>
#include <netinet/in.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>

#include <exception>
#include <system_error>
#include <thread>

#include "error.h"

namespace ebbtide::capture {

void verifyNetns(int fd, const std::string& name) {
  int type = ioctl(fd, NS_GET_NSTYPE);
  if (type < 0)
    throw CaptureError(name + " is not a namespace", errno,
                       "it must be bind-mounted from /proc/PID/ns/net and the mount must be visible here");
  if (type != CLONE_NEWNET) throw CaptureError(name + " is a namespace, but not of the network kind", EINVAL);
}

Fd openNetns(const std::string& path) {
  Fd fd(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (!fd) throw CaptureError("opening network namespace " + path, errno);
  verifyNetns(fd.get(), path);
  return fd;
}

uint64_t netnsInode(int fd) {
  struct stat info;
  if (fstat(fd, &info)) throw CaptureError("fstat of a network namespace", errno);
  return info.st_ino;
}

void inNetns(int fd, const std::function<void()>& function) {
  std::exception_ptr failure;
  try {
    std::thread([&] {
      try {
        if (setns(fd, CLONE_NEWNET))
          throw CaptureError("entering a network namespace", errno, "CAP_SYS_ADMIN is needed");
        function();
      } catch (...) {
        failure = std::current_exception();
      }
    }).join();
  } catch (const std::system_error& error) {
    throw CaptureError("starting a thread to enter a network namespace", error.code().value());
  }
  if (failure) std::rethrow_exception(failure);
}

uint64_t netnsCookie(int fd) {
  uint64_t cookie = 0;
  inNetns(fd, [&] {
    Fd socket_fd(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    if (!socket_fd) throw CaptureError("making a socket in a network namespace", errno);
    socklen_t size = sizeof(cookie);
    if (getsockopt(socket_fd.get(), SOL_SOCKET, SO_NETNS_COOKIE, &cookie, &size))
      throw CaptureError("asking SO_NETNS_COOKIE", errno, "Linux 5.15 or newer is needed");
  });
  return cookie;
}

std::string readInNetns(int fd, const std::string& path) {
  std::string text;
  inNetns(fd, [&] {
    Fd file(open(path.c_str(), O_RDONLY | O_CLOEXEC));
    if (!file) throw CaptureError("opening " + path + " in a network namespace", errno);
    char part[4096];
    ssize_t size = read(file.get(), part, sizeof(part));
    if (size < 0) throw CaptureError("reading " + path + " in a network namespace", errno);
    text.assign(part, static_cast<size_t>(size));
  });
  return text;
}

std::vector<Address> netnsAddresses(int fd) {
  std::vector<Address> addresses;
  inNetns(fd, [&] {
    ifaddrs* list = nullptr;
    if (getifaddrs(&list)) throw CaptureError("listing addresses in a network namespace", errno);
    for (ifaddrs* entry = list; entry; entry = entry->ifa_next) {
      if (!entry->ifa_addr) continue;
      if (entry->ifa_addr->sa_family == AF_INET) {
        addresses.push_back(mapIp4(reinterpret_cast<sockaddr_in*>(entry->ifa_addr)->sin_addr.s_addr));
      } else if (entry->ifa_addr->sa_family == AF_INET6) {
        Address address;
        std::memcpy(address.data(), &reinterpret_cast<sockaddr_in6*>(entry->ifa_addr)->sin6_addr,
                    sizeof(address));
        addresses.push_back(address);
      }
    }
    freeifaddrs(list);
  });
  return addresses;
}

}  // namespace ebbtide::capture
