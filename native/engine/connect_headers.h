// The header fields that HBONE's CONNECT carries beside the authority, and the PROXY protocol header that
// some targets want before the first byte. Names and forms are those of ztunnel.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "model.h"
#include "state.h"

namespace ebbtide {

// "k8s.cluster.name=..,k8s.namespace.name=..,..": who a workload is, for telemetry only. "" for null.
std::string baggageOf(const WorkloadPtr& workload);

// for="ip:port" and, when dialled by a service's address, ;host=<hostname>.
std::string forwardedOf(const SocketAddress& client, const ServicePtr& service);
// The address in for="..."; nullopt when absent or malformed.
std::optional<SocketAddress> forwardedFor(std::string_view forwarded);
// ip:port or [ip]:port, both parts mandatory.
std::optional<SocketAddress> parseSocketAddress(std::string_view text);

// W3C trace context of a new trace; `random` is 24 bytes.
std::string traceparentOf(const uint8_t* random);
// The 32 hexadecimal digits of the trace, "" when the field is malformed.
std::string traceIdOf(std::string_view traceparent);

// PROXY protocol version 2, command PROXY over TCP, with TLV 0xD0 holding the peer's SPIFFE URI when there is
// one.
std::string proxyHeader(const SocketAddress& source, const SocketAddress& destination,
                        const std::string& identity);

}  // namespace ebbtide
