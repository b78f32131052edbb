// Moves bytes between an application's socket and the other side of its connection, with half-close, reset
// and backpressure carried over in both directions.
#pragma once

#include <vector>

#include "socket_end.h"
#include "tunnel.h"

namespace ebbtide {

// Who a relay reports to: the connection it belongs to.
class RelayOwner {
 public:
  virtual void onStreamHeader(std::string_view, std::string_view) {}
  virtual void onStreamHeaders() {}
  // The stream ended before start(); `code` is HTTP/2's.
  virtual void onStreamRefused(uint32_t /*code*/) {}
  virtual void onStreamTunnelLost(Reason /*reason*/, const std::string& /*detail*/) {}
  virtual void fromApplication(size_t n) = 0;
  virtual void toApplication(size_t n) = 0;
  // Sockets are closed. Called once, after start().
  virtual void onRelayEnded(Reason reason, const std::string& detail) = 0;
  // Whom an exception within the relay ends.
  virtual Faultable& faultable() = 0;

 protected:
  ~RelayOwner() = default;
};

// Application socket <-> HTTP/2 stream.
class StreamRelay final : public StreamHandler, public SocketEnd::User {
 public:
  StreamRelay(Worker& worker, RelayOwner& owner, SocketEnd& application)
      : worker_(worker), owner_(owner), application_(application) {}
  ~StreamRelay();

  void bind(Tunnel* tunnel) { tunnel_ = tunnel; }
  Tunnel* tunnel() const { return tunnel_; }
  // Bytes may flow: the application is connected and the stream accepted.
  void start();
  // Ends both sides: RST_STREAM with `code`, RST to the application. Does not call onRelayEnded().
  void cut(uint32_t code);
  // Ends the stream only, which was not started: the application waits for another one.
  void abandon(uint32_t code);
  // Lets go of the stream without a word (it was answered).
  void letGo();

  void onHeader(std::string_view name, std::string_view value) override {
    owner_.onStreamHeader(name, value);
  }
  void onHeadersEnd() override { owner_.onStreamHeaders(); }
  void onData(const uint8_t* data, size_t n) override;
  void onTurnData() override;
  void onEnd() override;
  void onClosed(uint32_t code) override;
  void onTunnelLost(Reason reason, const std::string& detail) override;
  void onWritable() override;
  Faultable& faultable() override { return owner_.faultable(); }

  void onReadable(SocketEnd& end) override;
  void onDelivered(SocketEnd& end, size_t n) override;
  void onBroken(SocketEnd& end, int error) override;
  void onUnusable(SocketEnd&, const char* what) override { owner_.faultable().onFault(what); }

 private:
  void endIfDone();
  bool closing() const { return application_ended_ && tunnel_ != nullptr && tunnel_->sentEnd(*this); }
  void overflow();
  void end(Reason reason, const std::string& detail);

  Worker& worker_;
  RelayOwner& owner_;
  SocketEnd& application_;
  Tunnel* tunnel_ = nullptr;  // null once the stream is over
  bool started_ = false, ended_ = false;
  bool stream_ended_ = false;                   // END_STREAM, or the stream is over
  bool application_ended_ = false;              // FIN
  std::unique_ptr<std::vector<iovec>> slices_;  // of this turn; borrowed from the worker
};

// Socket <-> socket: plaintext connections.
class SocketRelay final : public SocketEnd::User {
 public:
  // `application` is the end whose bytes count as from the application.
  SocketRelay(Worker& worker, RelayOwner& owner, SocketEnd& application, SocketEnd& other)
      : worker_(worker), owner_(owner), application_(application), other_(other) {}
  void start();
  void onReadable(SocketEnd& end) override;
  void onDelivered(SocketEnd& end, size_t n) override;
  void onBroken(SocketEnd& end, int error) override;
  void onUnusable(SocketEnd&, const char* what) override { owner_.faultable().onFault(what); }

 private:
  SocketEnd& opposite(SocketEnd& end) { return &end == &application_ ? other_ : application_; }
  void endIfDone();

  Worker& worker_;
  RelayOwner& owner_;
  SocketEnd& application_;
  SocketEnd& other_;
  bool ended_ = false;
};

}  // namespace ebbtide
