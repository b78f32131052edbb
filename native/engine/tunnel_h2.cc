// HTTP/2 side of an HBONE connection: nghttp2's callbacks, framing in place, flow control.
#include <algorithm>
#include <cstring>

#include "tunnel_internal.h"
#include "worker.h"

namespace ebbtide {
namespace {

constexpr uint32_t kMaxConcurrentStreams = 200;  // as ztunnel's server
constexpr uint32_t kMaxHeaderList = 65'536;
// Largest DATA frame sent: frame and header are four whole TLS records.
constexpr size_t kMaxFrame = 4 * kRecordBytes - Tunnel::kHeadroom;
// DATA up to this size is copied beside other small frames instead of being a record of its own.
constexpr size_t kSmallFrame = 4096;

// Payload of one frame, chosen so that frame and header fill TLS records where the peer's limit allows.
size_t framePayload(size_t waiting, uint32_t peer_max_frame) {
  size_t records = (peer_max_frame + Tunnel::kHeadroom) / kRecordBytes;
  size_t limit = records == 0 ? peer_max_frame : records * kRecordBytes - Tunnel::kHeadroom;
  return std::min({waiting, limit, kMaxFrame});
}

// A window's worth that an application takes within this time earns it a larger one, up to the configured
// size: 16 MiB/s do, over any distance.
constexpr uint64_t kWidenWithinUs = 250'000;

Tunnel* tunnelOf(void* user_data) {
  return static_cast<Tunnel*>(user_data);
}

}  // namespace

// Static functions with the library's signatures; a struct so that they are the tunnel's friends.
struct Tunnel::Callbacks {
  static StreamHandler* handler(nghttp2_session* session, int32_t stream) {
    return static_cast<StreamHandler*>(nghttp2_session_get_stream_user_data(session, stream));
  }

  // No exception may pass through the library: what a stream threw ends that stream.
  template <typename F>
  static bool guard(void* user, StreamHandler* target, F&& work) {
    return tunnelOf(user)->worker_.loop.guard("stream", target != nullptr ? &target->faultable() : nullptr,
                                              work);
  }

  static int beginHeaders(nghttp2_session*, const nghttp2_frame* frame, void* user) {
    if (frame->hd.type != NGHTTP2_HEADERS || frame->headers.cat != NGHTTP2_HCAT_REQUEST) return 0;
    bool begun = guard(user, nullptr, [&] { tunnelOf(user)->onRequest(frame->hd.stream_id); });
    return begun ? 0 : NGHTTP2_ERR_TEMPORAL_CALLBACK_FAILURE;  // RST_STREAM
  }

  static int header(nghttp2_session* session, const nghttp2_frame* frame, const uint8_t* name,
                    size_t name_size, const uint8_t* value, size_t value_size, uint8_t, void* user) {
    if (frame->hd.type != NGHTTP2_HEADERS) return 0;
    if (auto* target = handler(session, frame->hd.stream_id)) {
      guard(user, target, [&] {
        target->onHeader({reinterpret_cast<const char*>(name), name_size},
                         {reinterpret_cast<const char*>(value), value_size});
      });
    }
    return 0;
  }

  static int frameReceived(nghttp2_session* session, const nghttp2_frame* frame, void* user) {
    auto* tunnel = tunnelOf(user);
    auto* target = frame->hd.stream_id != 0 ? handler(session, frame->hd.stream_id) : nullptr;
    switch (frame->hd.type) {
      case NGHTTP2_HEADERS:
        if (target != nullptr) guard(user, target, [&] { target->onHeadersEnd(); });
        // The handler may have detached itself.
        target = handler(session, frame->hd.stream_id);
        [[fallthrough]];
      case NGHTTP2_DATA:
        if (target != nullptr && (frame->hd.flags & NGHTTP2_FLAG_END_STREAM)) {
          guard(user, target, [&] { target->onEnd(); });
        }
        break;
      case NGHTTP2_WINDOW_UPDATE:
        tunnel->credit_changed_ = true;
        break;
      case NGHTTP2_SETTINGS:
        tunnel->credit_changed_ = true;
        tunnel->peer_settings_ = true;
        if (!(frame->hd.flags & NGHTTP2_FLAG_ACK)) guard(user, nullptr, [&] { tunnel->onSettings(); });
        break;
      case NGHTTP2_PING:
        if (!(frame->hd.flags & NGHTTP2_FLAG_ACK)) break;
        tunnel->ping_us_ = 0;
        tunnel->answered_us_ = tunnel->worker_.loop.nowUs();
        break;
      case NGHTTP2_RST_STREAM:
        // Came together with its request, or before its answer.
        if (tunnel->server_ && (frame->hd.stream_id > tunnel->newest_before_turn_ ||
                                (target != nullptr && !target->answered_))) {
          tunnel->countCancelled();
        }
        break;
      case NGHTTP2_GOAWAY:
        tunnel->going_away_ = true;
        guard(user, nullptr, [&] { tunnel->onGoaway(); });
        break;
      default:
        break;
    }
    return 0;
  }

  static int dataReceived(nghttp2_session* session, uint8_t, int32_t stream, const uint8_t* data, size_t n,
                          void* user) {
    auto* tunnel = tunnelOf(user);
    // Connection credit on arrival, stream credit on delivery: a reader that stalls never stalls other
    // streams. What they may pile up is bounded by the sum of their windows, see adaptWindow().
    nghttp2_session_consume_connection(session, n);
    auto* target = handler(session, stream);
    if (target != nullptr) {
      guard(user, target, [&] { target->onData(data, n); });
      target = handler(session, stream);  // gone when its application's share of buffers is used up
    }
    if (target != nullptr) {
      tunnel->data_.pushBack(target->data_hook_);
    } else {
      nghttp2_session_consume_stream(session, stream, n);
    }
    return 0;
  }

  static int streamClosed(nghttp2_session* session, int32_t stream, uint32_t code, void* user) {
    auto* tunnel = tunnelOf(user);
    auto* target = handler(session, stream);
    if (target == nullptr) return 0;
    tunnel->forget(*target);
    // Data of this turn first; a clean end must not overtake it.
    if (target->data_hook_.linked()) {
      target->data_hook_.unlink();
      guard(user, target, [&] { target->onTurnData(); });
    }
    guard(user, target, [&] { target->onClosed(code); });
    guard(user, nullptr, [&] { tunnel->onStreamEnded(); });
    return 0;
  }

  // A request that was queued when GOAWAY came: the library drops it without closing a stream it never
  // opened.
  static int frameNotSent(nghttp2_session* session, const nghttp2_frame* frame, int, void* user) {
    if (frame->hd.type != NGHTTP2_HEADERS || frame->headers.cat != NGHTTP2_HCAT_REQUEST) return 0;
    auto* tunnel = tunnelOf(user);
    StreamHandler* dropped = nullptr;
    tunnel->streams_.forEach([&](StreamHandler& each) {
      if (each.stream_ == frame->hd.stream_id) dropped = &each;
    });
    if (dropped == nullptr) return 0;
    nghttp2_session_set_stream_user_data(session, frame->hd.stream_id, nullptr);
    tunnel->forget(*dropped);
    guard(user, dropped, [&] { dropped->onClosed(NGHTTP2_REFUSED_STREAM); });
    guard(user, nullptr, [&] { tunnel->onStreamEnded(); });
    return 0;
  }

  static ssize_t readLength(nghttp2_session* session, uint8_t, int32_t stream, int32_t connection_window,
                            int32_t stream_window, uint32_t peer_max_frame, void*) {
    auto* target = handler(session, stream);
    size_t waiting = target == nullptr ? 0 : target->source_size_;
    size_t payload = framePayload(waiting, peer_max_frame);
    auto window = static_cast<size_t>(std::max(1, std::min(connection_window, stream_window)));
    return static_cast<ssize_t>(std::clamp<size_t>(payload, 1, window));
  }

  static ssize_t readSource(nghttp2_session* session, int32_t stream, uint8_t*, size_t length,
                            uint32_t* flags, nghttp2_data_source*, void*) {
    auto* target = handler(session, stream);
    if (target == nullptr) return NGHTTP2_ERR_DEFERRED;
    size_t n = std::min(length, target->source_size_);
    if (n == 0) {
      if (!target->source_end_) return NGHTTP2_ERR_DEFERRED;
      *flags |= NGHTTP2_DATA_FLAG_EOF;
      return 0;
    }
    *flags |= NGHTTP2_DATA_FLAG_NO_COPY;
    return static_cast<ssize_t>(n);
  }

  static int sendData(nghttp2_session* session, nghttp2_frame* frame, const uint8_t* header, size_t n,
                      nghttp2_data_source*, void* user) {
    auto* tunnel = tunnelOf(user);
    auto* target = handler(session, frame->hd.stream_id);
    if (target == nullptr || target->source_size_ < n) return NGHTTP2_ERR_TEMPORAL_CALLBACK_FAILURE;
    const uint8_t* payload = target->source_;
    target->source_ += n;
    target->source_size_ -= n;
    if (n <= kSmallFrame) {
      tunnel->stage(header, kHeadroom);
      tunnel->stage(payload, n);
    } else {
      // The header goes in front of the payload in place: what was there is headroom, or was encrypted
      // before.
      tunnel->flushStage();
      auto* start = const_cast<uint8_t*>(payload) - kHeadroom;
      std::memcpy(start, header, kHeadroom);
      bool written = false;
      guard(user, nullptr, [&] { written = tunnel->tls_.write(start, kHeadroom + n); });
      if (!written) tunnel->fatal_ = true;
    }
    return tunnel->fatal_ ? NGHTTP2_ERR_CALLBACK_FAILURE : 0;
  }

  static const nghttp2_session_callbacks* all() {
    static const nghttp2_session_callbacks* const callbacks = [] {
      nghttp2_session_callbacks* created = nullptr;
      nghttp2_session_callbacks_new(&created);
      nghttp2_session_callbacks_set_on_begin_headers_callback(created, beginHeaders);
      nghttp2_session_callbacks_set_on_header_callback(created, header);
      nghttp2_session_callbacks_set_on_frame_recv_callback(created, frameReceived);
      nghttp2_session_callbacks_set_on_data_chunk_recv_callback(created, dataReceived);
      nghttp2_session_callbacks_set_on_stream_close_callback(created, streamClosed);
      nghttp2_session_callbacks_set_on_frame_not_send_callback(created, frameNotSent);
      nghttp2_session_callbacks_set_data_source_read_length_callback(created, readLength);
      nghttp2_session_callbacks_set_send_data_callback(created, sendData);
      return created;
    }();
    return callbacks;
  }

  static nghttp2_data_provider provider() {
    nghttp2_data_provider provider{};
    provider.read_callback = readSource;
    return provider;
  }
};

namespace {

std::vector<nghttp2_nv> nameValues(const HeaderFields& fields) {
  std::vector<nghttp2_nv> out;
  out.reserve(fields.size());
  for (auto& [name, value] : fields) {
    // Values differ with every connection: indexing them would only churn the compression table.
    bool unique = name == "traceparent" || name == "forwarded";
    out.push_back({reinterpret_cast<uint8_t*>(const_cast<char*>(name.data())),
                   reinterpret_cast<uint8_t*>(const_cast<char*>(value.data())), name.size(), value.size(),
                   static_cast<uint8_t>(unique ? NGHTTP2_NV_FLAG_NO_INDEX : NGHTTP2_NV_FLAG_NONE)});
  }
  return out;
}

}  // namespace

int createSession(nghttp2_session** session, bool server, const EngineConfig& config, Tunnel* tunnel) {
  nghttp2_option* option = nullptr;
  if (int error = nghttp2_option_new(&option); error != 0) return error;
  nghttp2_option_set_no_auto_window_update(option, 1);
  nghttp2_option_set_no_closed_streams(option, 1);
  nghttp2_option_set_peer_max_concurrent_streams(option, 100);  // until the peer's SETTINGS say otherwise
  nghttp2_option_set_max_outbound_ack(option, 1000);            // PING and SETTINGS floods
  nghttp2_option_set_stream_reset_rate_limit(option, 1'000'000, 100'000);  // countCancelled() knows better
  nghttp2_option_set_max_continuations(option, 8);
  auto* callbacks = Tunnel::callbacks();
  int error = server ? nghttp2_session_server_new2(session, callbacks, tunnel, option)
                     : nghttp2_session_client_new2(session, callbacks, tunnel, option);
  nghttp2_option_del(option);
  if (error != 0) return error;
  std::vector<nghttp2_settings_entry> settings = {
      {NGHTTP2_SETTINGS_INITIAL_WINDOW_SIZE, Tunnel::kStreamFloor},
      {NGHTTP2_SETTINGS_MAX_FRAME_SIZE, config.frame_size},
      {NGHTTP2_SETTINGS_MAX_HEADER_LIST_SIZE, server ? kMaxHeaderList : 16'384u},
  };
  if (server) {
    settings.push_back({NGHTTP2_SETTINGS_MAX_CONCURRENT_STREAMS, kMaxConcurrentStreams});
  } else {
    settings.push_back({NGHTTP2_SETTINGS_ENABLE_PUSH, 0});
  }
  error = nghttp2_submit_settings(*session, NGHTTP2_FLAG_NONE, settings.data(), settings.size());
  if (error != 0) return error;
  return nghttp2_session_set_local_window_size(*session, NGHTTP2_FLAG_NONE, 0,
                                               static_cast<int32_t>(config.connection_window));
}

const nghttp2_session_callbacks* Tunnel::callbacks() {
  return Callbacks::all();
}

void Tunnel::forget(StreamHandler& handler) {
  // A stream whose last data could not be delivered is reset while it closes: it counts once.
  if (!handler.streams_hook_.linked()) return;
  handler.streams_hook_.unlink();
  handler.blocked_hook_.unlink();
  stream_count_--;
  widened_ -= handler.window_ - kStreamFloor;
  handler.window_ = kStreamFloor;
}

size_t Tunnel::sendable(const StreamHandler& handler) const {
  if (saturated()) return 0;
  int32_t window = std::min(nghttp2_session_get_remote_window_size(h2_),
                            nghttp2_session_get_stream_remote_window_size(h2_, handler.stream_));
  return window <= 0 ? 0 : std::min(static_cast<size_t>(window), kSendBytes);
}

void Tunnel::send(StreamHandler& handler, uint8_t* data, size_t n) {
  handler.source_ = data;
  handler.source_size_ = n;
  nghttp2_session_resume_data(h2_, handler.stream_);
  pump();
  if (handler.source_size_ > 0) fatal_ = true;  // the bytes would be lost: better the connection
  handler.source_ = nullptr;
  handler.source_size_ = 0;
  // A full turn's worth goes out at once, so that one block suffices; small pieces wait for the turn's end.
  if (!fatal_ && tls_.output().size() >= kTurnBytes / 2) {
    flushStage();
    writeSocket();
  }
  if (fd_) markDirty();
}

void Tunnel::sendEnd(StreamHandler& handler) {
  handler.source_end_ = true;
  nghttp2_session_resume_data(h2_, handler.stream_);
  markDirty();
}

void Tunnel::reset(StreamHandler& handler, uint32_t code) {
  detach(handler);
  nghttp2_submit_rst_stream(h2_, NGHTTP2_FLAG_NONE, handler.stream_, code);
  markDirty();
}

void Tunnel::detach(StreamHandler& handler) {
  nghttp2_session_set_stream_user_data(h2_, handler.stream_, nullptr);
  handler.data_hook_.unlink();
  forget(handler);
  onStreamEnded();
  markDirty();
}

void Tunnel::delivered(StreamHandler& handler, size_t n) {
  nghttp2_session_consume_stream(h2_, handler.stream_, n);
  handler.delivered_ += n;
  if (handler.delivered_ >= handler.window_) adaptWindow(handler);
  markDirty();
}

// A window is what we must hold when the application stops reading. So it grows with what the application has
// shown to take, within a connection window's worth for all streams of the tunnel; and while the pod's
// applications leave much unread it shrinks again.
void Tunnel::adaptWindow(StreamHandler& handler) {
  const uint64_t now = worker_.loop.nowUs();
  const bool fast = now - handler.window_since_us_ < kWidenWithinUs;
  handler.delivered_ = 0;
  handler.window_since_us_ = now;
  uint64_t wanted = handler.window_;
  if (pod_->budget.pressed()) {
    wanted = std::max<uint64_t>(wanted / 2, kStreamFloor);
  } else if (fast) {
    uint64_t room =
        worker_.config().connection_window - std::min<uint64_t>(widened_, worker_.config().connection_window);
    uint64_t limit = std::max(worker_.config().stream_window, kStreamFloor);
    wanted = std::min({wanted * 2, wanted + room, limit});
  }
  if (wanted == handler.window_) return;
  int error = nghttp2_session_set_local_window_size(h2_, NGHTTP2_FLAG_NONE, handler.stream_,
                                                    static_cast<int32_t>(wanted));
  if (error != 0) return;  // no memory: it stays as it was
  widened_ += wanted - handler.window_;
  handler.window_ = static_cast<uint32_t>(wanted);
}

void Tunnel::attach(StreamHandler& handler, int32_t stream) {
  nghttp2_session_set_stream_user_data(h2_, stream, &handler);
  handler.stream_ = stream;
  handler.window_ = kStreamFloor;
  handler.window_since_us_ = worker_.loop.nowUs();
  streams_.pushBack(handler.streams_hook_);
  stream_count_++;
}

bool Tunnel::submitConnect(StreamHandler& handler, const HeaderFields& fields) {
  auto values = nameValues(fields);
  auto provider = Callbacks::provider();
  int32_t stream = nghttp2_submit_request(h2_, nullptr, values.data(), values.size(), &provider, &handler);
  if (stream < 0) return false;
  handler.stream_ = stream;
  handler.window_ = kStreamFloor;
  handler.window_since_us_ = worker_.loop.nowUs();
  streams_.pushBack(handler.streams_hook_);
  stream_count_++;
  markDirty();
  return true;
}

void Tunnel::submitAnswer(StreamHandler& handler, const HeaderFields& fields, bool end) {
  auto values = nameValues(fields);
  auto provider = Callbacks::provider();
  handler.answered_ = true;
  nghttp2_submit_response(h2_, handler.stream_, values.data(), values.size(), end ? nullptr : &provider);
  markDirty();
}

void Tunnel::pump() {
  if (pumping_ || fatal_) return;
  pumping_ = true;
  const uint8_t* data = nullptr;
  // While the kernel does not take what is queued, the library keeps its frames; it bounds them itself.
  while (!fatal_ && tls_.output().size() <= 2 * Block::kCapacity) {
    ssize_t n = nghttp2_session_mem_send(h2_, &data);
    if (n <= 0) {
      if (n < 0) fatal_ = true;
      break;
    }
    stage(data, static_cast<size_t>(n));
  }
  pumping_ = false;
}

// Bytes that cannot be taken here are lost, and with them the connection.
void Tunnel::stage(const uint8_t* data, size_t n) {
  if (!worker_.loop.guard("tunnel", nullptr, [&] { stageAll(data, n); })) fatal_ = true;
}

void Tunnel::stageAll(const uint8_t* data, size_t n) {
  while (n > 0) {
    if (!stage_) stage_ = std::unique_ptr<Stage>(new Stage);
    size_t part = std::min(n, kRecordBytes - stage_->size);
    std::memcpy(stage_->data + stage_->size, data, part);
    stage_->size += part;
    data += part;
    n -= part;
    if (stage_->size == kRecordBytes) {
      if (!tls_.write(stage_->data, stage_->size)) fatal_ = true;
      stage_->size = 0;
    }
  }
}

void Tunnel::flushStage() {
  if (!stage_) return;
  bool written = worker_.loop.guard("tunnel", nullptr, [this] {
    if (stage_->size > 0 && !fatal_ && !tls_.write(stage_->data, stage_->size)) fatal_ = true;
  });
  if (!written) fatal_ = true;
  stage_.reset();
}

}  // namespace ebbtide
