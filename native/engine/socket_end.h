// A TCP connection to an application (or a plain next hop) on a worker's loop: connect, read when asked,
// write what the kernel takes and keep the rest, half-close, reset.
#pragma once

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
  // broken.
  // `last`: finish() follows, so that the FIN may go with the last bytes.
  bool write(iovec* vectors, int count, size_t& taken, int& error, bool last = false);
  // Out at once and before what waits; false unless the kernel takes all of it.
  bool writeFirst(const void* data, size_t n);
  void enqueue(const void* data, size_t n) { waiting_.append(data, n); }
  size_t waiting() const { return waiting_.size(); }
  // Tries to write what waits. False: broken.
  bool drain(int& error);
  // FIN after everything queued.
  void finish();
  // After finish() and everything was given to the kernel.
  bool finished() const { return shut_; }
  void close(bool reset);
  void onEvents(uint32_t events) override;
  void onFault() override;

 private:
  void update();

  Worker& worker_;
  User* user_;
  Fd fd_;
  uint32_t mask_ = 0;
  bool connecting_ = false, read_wanted_ = false, finish_wanted_ = false, shut_ = false, detached_ = false;
  ByteQueue waiting_;
};

}  // namespace ebbtide
