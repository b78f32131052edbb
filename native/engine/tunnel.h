// One HBONE connection: TCP, TLS and HTTP/2 joined, the part that both ends share. Carries many streams;
// moves bytes between their handlers and the socket with few large system calls.
#pragma once

#include <nghttp2/nghttp2.h>

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "list.h"
#include "loop.h"
#include "reason.h"
#include "tls_stream.h"

namespace ebbtide {

class Tunnel;
class Worker;
struct Pod;

// Header fields of a CONNECT request or its answer.
using HeaderFields = std::vector<std::pair<std::string_view, std::string_view>>;

// One stream of a tunnel. Called by the tunnel only, on its worker. Callbacks that come from received frames
// run inside the HTTP/2 library: they may submit (respond, sendEnd, reset) but not send().
class StreamHandler {
 public:
  // Also of interim answers and trailers: the handler knows which it waits for.
  virtual void onHeader(std::string_view name, std::string_view value) = 0;
  virtual void onHeadersEnd() = 0;
  // Valid until the call that follows all frames of this turn, onTurnData().
  virtual void onData(const uint8_t* data, size_t n) = 0;
  virtual void onTurnData() = 0;
  virtual void onEnd() = 0;  // END_STREAM
  // The stream is over: an HTTP/2 error code, NO_ERROR when both ends ended it. Nothing else is called after.
  virtual void onClosed(uint32_t code) = 0;
  // The connection underneath is gone. Nothing else is called after.
  virtual void onTunnelLost(Reason reason, const std::string& detail) = 0;
  virtual void onWritable() = 0;  // after Tunnel::waitWritable()
  // Whom an exception of the functions above ends.
  virtual Faultable& faultable() = 0;

 protected:
  StreamHandler() : streams_hook_(this), data_hook_(this), blocked_hook_(this) {}
  ~StreamHandler() = default;

 private:
  friend class Tunnel;
  ListHook<StreamHandler> streams_hook_, data_hook_, blocked_hook_;
  int32_t stream_ = -1;
  // What send() was given and the library has not framed yet.
  const uint8_t* source_ = nullptr;
  size_t source_size_ = 0;
  bool source_end_ = false, answered_ = false;
  // What the peer may send ahead of the application, and how fast the application takes it.
  uint32_t window_ = 0;
  size_t delivered_ = 0;
  uint64_t window_since_us_ = 0;
};

class Tunnel : public Pollable, public Disposable {
 public:
  ~Tunnel() override;

  // ---- streams ----
  // Room before each byte given to send(), for the frame header that is written in place.
  static constexpr size_t kHeadroom = 9;
  // Payload bytes a turn that fill whole TLS records.
  static constexpr size_t kSendBytes = kTurnBytes - 4 * kHeadroom;

  // Receive window of a stream whose application has not shown yet that it reads: 200 of them and the
  // connection's window bound what a tunnel may make us hold. HTTP/2's own default, so that it holds from the
  // first byte.
  static constexpr uint32_t kStreamFloor = 65'535;

  // How many bytes send() may be given now; 0: wait with waitWritable().
  size_t sendable(const StreamHandler& handler) const;
  void waitWritable(StreamHandler& handler) { blocked_.pushBack(handler.blocked_hook_); }
  // Frames, encrypts and queues all n <= sendable() bytes; overwrites data[-kHeadroom, n).
  void send(StreamHandler& handler, uint8_t* data, size_t n);
  void sendEnd(StreamHandler& handler);
  // RST_STREAM; the handler hears no more.
  void reset(StreamHandler& handler, uint32_t code);
  // The handler hears no more; what arrives for the stream is dropped.
  void detach(StreamHandler& handler);
  // `n` bytes of the stream's data reached the application.
  void delivered(StreamHandler& handler, size_t n);
  // Whether END_STREAM went out.
  bool sentEnd(const StreamHandler& handler) const {
    return nghttp2_session_get_stream_local_close(h2_, handler.stream_) == 1;
  }
  size_t streams() const { return stream_count_; }
  // Client: opens a stream with a CONNECT request. False: the connection takes no more.
  bool submitConnect(StreamHandler& handler, const HeaderFields& fields);
  // Server: answers a request; `end` with END_STREAM.
  void submitAnswer(StreamHandler& handler, const HeaderFields& fields, bool end);

  // ---- connection ----
  bool closed() const { return !fd_; }
  const std::shared_ptr<Pod>& pod() const { return pod_; }
  const PeerCheck& peer() { return tls_.peer(); }
  // Ends it and all its streams at once.
  void close(Reason reason, const std::string& detail);
  void onEvents(uint32_t events) override;
  void onFault(const char* what) override;
  // End of the loop's turn: everything queued goes to the kernel. Called by the worker for dirty tunnels.
  void flush();
  static const nghttp2_session_callbacks* callbacks();

 protected:
  Tunnel(Worker& worker, std::shared_ptr<Pod> pod, bool server);

  // `connecting`: its connect() is in progress. Otherwise startTls() or watchEnd() follows.
  void adopt(Fd fd, bool connecting);
  // Notices the end of a connection that is not read yet.
  void watchEnd();
  // TLS on the connected socket. The phase timer bounds it.
  void startTls(std::shared_ptr<const TlsContext> context);
  void markDirty();
  void closeIfFinished();

  virtual void onConnected(int error) = 0;  // client: connect() ended
  virtual void onOpen() = 0;                // TLS and ALPN done, HTTP/2 started
  virtual void onRequest(int32_t) {}        // server: a new stream; call attach()
  virtual void onGoaway() {}
  virtual void onSettings() {}
  virtual void onStreamEnded() {}  // one stream fewer
  // The connection ended; the tunnel is disposed of after it. `opened`: it had come as far as onOpen().
  virtual void onEnded(Reason reason, const std::string& detail, bool opened) = 0;
  void attach(StreamHandler& handler, int32_t stream);

  Worker& worker_;
  std::shared_ptr<Pod> pod_;
  TlsStream tls_;
  nghttp2_session* h2_ = nullptr;
  bool going_away_ = false, peer_settings_ = false;

 private:
  struct Callbacks;
  struct Stage;
  void forget(StreamHandler& handler);
  void readSocket();
  bool startHttp2();
  void pump();
  void stage(const uint8_t* data, size_t n);
  void stageAll(const uint8_t* data, size_t n);
  void flushStage();
  void writeSocket();
  void wantWrite(bool want);
  void watch(uint32_t events);
  void keepalive();
  void adaptWindow(StreamHandler& handler);
  void stalled(const char* detail);
  void closeStreams(Reason reason, const std::string& detail) noexcept;
  void resumeBlocked();
  void countCancelled();
  bool saturated() const { return tls_.output().size() > kOutputBound; }

  // Ciphertext the kernel has not taken, above which applications are not read and frames not produced.
  static constexpr size_t kOutputBound = 64u << 10;

  const bool server_;
  bool connecting_ = false, writing_ = false, opened_ = false, pumping_ = false, fatal_ = false,
       ended_ = false, watched_ = false;
  bool credit_changed_ = false, flooded_ = false;
  Fd fd_;
  ListHook<Tunnel> dirty_hook_;
  List<StreamHandler> streams_, data_, blocked_;
  size_t stream_count_ = 0;
  uint64_t widened_ = 0;  // by how much the open streams' windows are above kStreamFloor, in all
  std::unique_ptr<Stage> stage_;
  Timer phase_timer_;
  uint64_t last_receive_us_ = 0;
  // Bytes given to the kernel, and how many of them the peer's kernel had at the last look.
  uint64_t written_ = 0, taken_ = 0, progress_us_ = 0;
  // The last PING: when the peer had it, and where in the output it ends. No time: it was answered.
  uint64_t ping_us_ = 0, ping_end_ = 0, answered_us_ = 0;
  bool ping_queued_ = false;
  // Requests that the peer took back before their answer: a bucket that leaks kCancelledPerSecond.
  uint32_t cancelled_ = 0;
  int32_t newest_before_turn_ = 0;  // stream
  uint64_t cancelled_us_ = 0;

  friend class Worker;
};

}  // namespace ebbtide
