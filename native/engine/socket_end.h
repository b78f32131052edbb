// A TCP connection to an application (or a plain next hop) on a worker's loop: connect, read when asked,
// write what the kernel takes and keep the rest, half-close, reset.
#pragma once

#include <cerrno>

#include "bytes.h"
#include "loop.h"

namespace ebbtide {

class Worker;

class SocketEnd final : public Pollable {
 public:
  class User {
   public:
    virtual void onConnected(SocketEnd&, int /*error*/) {}
    virtual void onReadable(SocketEnd&) {}
    virtual void onDelivered(SocketEnd&, size_t /*n*/) {}  // bytes that had waited were taken by the kernel
    virtual void onBroken(SocketEnd& end, int error) = 0;  // reset or timed out
    // An exception came out of the functions above, or the kernel does not watch the socket.
    virtual void onUnusable(SocketEnd&, const char* what) = 0;

   protected:
    ~User() = default;
  };

  // `budget`: of the bytes that wait.
  SocketEnd(Worker& worker, User& user, BufferBudget& budget);
  ~SocketEnd();

  void setUser(User& user) { user_ = &user; }
  // A socket whose end is noticed from now on, or one whose connect() is in progress.
  void adopt(Fd fd, bool connecting);
  // A connected socket that is going to be read at once.
  void adoptConnected(Fd fd);
  bool open() const { return static_cast<bool>(fd_); }
  int fd() const { return fd_.get(); }

  void wantRead(bool want);
  // At most `capacity` bytes; 0: end. -1: nothing now; -2: broken, `error` says why.
  ssize_t read(uint8_t* out, size_t capacity, int& error);
  // What the kernel takes now of `vectors` goes out, the rest is queued. `taken`: bytes that went out. False:
  // broken, or ENOBUFS when the pod's share of buffers has no room for the rest.
  // `last`: finish() follows, so that the FIN may go with the last bytes.
  bool write(iovec* vectors, int count, size_t& taken, int& error, bool last = false);
  // Out at once and before what waits; false unless the kernel takes all of it.
  bool writeFirst(const void* data, size_t n);
  // False: the pod's share of buffers has no room for it, although those were cut that do not read.
  bool enqueue(const void* data, size_t n);
  size_t waiting() const { return waiting_.size(); }
  // Much waits for the pod's applications.
  bool pressed() const { return budget_.pressed(); }
  // Tries to write what waits. False: broken.
  bool drain(int& error);
  // FIN after everything queued.
  void finish();
  // After finish() and everything was given to the kernel.
  bool finished() const { return shut_; }
  void close(bool reset);
  void onEvents(uint32_t events) override;
  // Waits for an application that has taken nothing since `before_us`.
  bool stalledSince(uint64_t before_us) const { return progress_us_ <= before_us; }
  const BufferBudget& budget() const { return budget_; }
  // Its place in memory is needed for others.
  void overflow() {
    waiting_hook_.unlink();
    user_->onBroken(*this, ENOBUFS);
  }
  void onFault(const char* what) override {
    if (fd_) user_->onUnusable(*this, what);
  }

 private:
  void update();
  void progressed();

  Worker& worker_;
  User* user_;
  Fd fd_;
  uint32_t mask_ = 0;
  BufferBudget& budget_;
  bool connecting_ = false, read_wanted_ = false, finish_wanted_ = false, shut_ = false, detached_ = false;
  ByteQueue waiting_;
  // While bytes wait: in the worker's list, in the order of when the application last took some.
  ListHook<SocketEnd> waiting_hook_;
  uint64_t progress_us_ = 0;
};

}  // namespace ebbtide
