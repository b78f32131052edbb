// Policy semantics as tables: what matches, what decides, what is refused.
#include "authorize.h"

#include <gtest/gtest.h>

namespace ebbtide {
namespace {

using Kind = StringMatch::Kind;
using Action = Policy::Action;
using Scope = Policy::Scope;

IpAddress ip(const char* text) {
  return IpAddress::parse(text).value();
}

const Identity kMe{"td", "ns", "me"}, kOther{"td", "other", "you"};

// The clients of the tables: who connects.
struct Clients {
  bool plaintext, me, other;
};

PolicySubject subjectOf(const Identity* peer, const char* source = "10.1.2.3",
                        const char* destination = "10.0.0.1", uint16_t port = 80) {
  return {peer, peer != nullptr ? peer->principal() : "", ip(source), {ip(destination), port}};
}

Policy policyOf(PolicyMatch match, Action action = Action::kAllow) {
  Policy policy;
  policy.name = "p";
  policy.ns = "ns";
  policy.action = action;
  policy.rules = {{{std::move(match)}}};
  return policy;
}

PolicyMatch principal(Kind kind, const char* value, bool negative = false) {
  PolicyMatch match;
  (negative ? match.principals.none_of : match.principals.any_of) = {{kind, value}};
  return match;
}

PolicyMatch nameSpace(Kind kind, const char* value, bool negative = false) {
  PolicyMatch match;
  (negative ? match.namespaces.none_of : match.namespaces.any_of) = {{kind, value}};
  return match;
}

PolicyMatch account(const char* ns, const char* name, bool negative = false) {
  PolicyMatch match;
  (negative ? match.service_accounts.none_of : match.service_accounts.any_of).push_back({ns, name});
  return match;
}

TEST(Authorize, IdentityTruthTable) {
  struct Row {
    const char* name;
    PolicyMatch match;
    Clients expected;
  };
  const char* me = "td/ns/ns/sa/me";
  const Row rows[] = {
      {"principal exact", principal(Kind::kExact, me), {false, true, false}},
      {"principal prefix", principal(Kind::kPrefix, "td/ns/ns/"), {false, true, false}},
      {"principal suffix", principal(Kind::kSuffix, "/sa/me"), {false, true, false}},
      {"principal empty prefix", principal(Kind::kPrefix, ""), {false, true, true}},
      {"principal presence", principal(Kind::kPresence, ""), {false, true, true}},
      {"principal with scheme", principal(Kind::kExact, "spiffe://td/ns/ns/sa/me"), {false, false, false}},
      {"not principal exact", principal(Kind::kExact, me, true), {true, false, true}},
      {"not principal prefix", principal(Kind::kPrefix, "td/ns/ns/", true), {true, false, true}},
      {"not principal suffix", principal(Kind::kSuffix, "/sa/me", true), {true, false, true}},
      {"not principal presence", principal(Kind::kPresence, "", true), {true, false, false}},
      {"namespace exact", nameSpace(Kind::kExact, "ns"), {false, true, false}},
      {"namespace prefix", nameSpace(Kind::kPrefix, "oth"), {false, false, true}},
      {"namespace suffix", nameSpace(Kind::kSuffix, "er"), {false, false, true}},
      {"namespace empty prefix", nameSpace(Kind::kPrefix, ""), {true, true, true}},
      {"namespace empty suffix", nameSpace(Kind::kSuffix, ""), {true, true, true}},
      {"namespace presence", nameSpace(Kind::kPresence, ""), {false, true, true}},
      {"not namespace exact", nameSpace(Kind::kExact, "ns", true), {true, false, true}},
      {"not namespace presence", nameSpace(Kind::kPresence, "", true), {true, false, false}},
      {"service account", account("ns", "me"), {false, true, false}},
      {"service account of another namespace", account("other", "me"), {false, false, false}},
      {"not service account", account("ns", "me", true), {true, false, true}},
      {"nothing asked", PolicyMatch{}, {false, false, false}},
  };
  for (const Row& row : rows) {
    for (const Action action : {Action::kAllow, Action::kDeny}) {
      const Policy policy = policyOf(row.match, action);
      EXPECT_EQ(policyMatches(policy, subjectOf(nullptr)), row.expected.plaintext)
          << row.name << ", plaintext";
      EXPECT_EQ(policyMatches(policy, subjectOf(&kMe)), row.expected.me) << row.name << ", me";
      EXPECT_EQ(policyMatches(policy, subjectOf(&kOther)), row.expected.other) << row.name << ", other";
    }
  }
  // A service account is the same in every trust domain.
  const Identity elsewhere{"td2", "ns", "me"};
  EXPECT_TRUE(policyMatches(policyOf(account("ns", "me")), subjectOf(&elsewhere)));
  EXPECT_FALSE(policyMatches(policyOf(principal(Kind::kExact, me)), subjectOf(&elsewhere)));
}

TEST(Authorize, AddressTruthTable) {
  struct Row {
    const char* network;
    uint8_t length;
    const char* address;
    bool inside;
  };
  const Row rows[] = {
      {"10.1.2.0", 24, "10.1.2.3", true},
      {"10.1.2.0", 24, "10.1.3.3", false},
      {"10.1.2.3", 32, "10.1.2.3", true},
      {"10.1.2.3", 32, "10.1.2.2", false},
      {"10.1.2.99", 24, "10.1.2.3", true},
      {"0.0.0.0", 0, "10.1.2.3", true},
      {"10.1.2.0", 23, "10.1.3.255", true},
      {"10.1.2.0", 23, "10.1.4.0", false},
      {"10.1.2.3", 33, "10.1.2.3", false},
      {"10.1.2.0", 24, "::ffff:10.1.2.3", true},
      {"10.1.2.0", 24, "fd00::1", false},
      {"::", 0, "10.1.2.3", false},
      {"::", 0, "fd00::1", true},
      {"fd00::", 8, "fdff::1", true},
      {"fd00::", 8, "fe00::1", false},
      {"fd00::8000", 113, "fd00::8001", true},
      {"fd00::8000", 113, "fd00::7fff", false},
      {"fd00::1", 128, "fd00::1", true},
      {"fd00::1", 128, "fd00::2", false},
      {"0.0.0.0", 0, "fd00::1", false},
  };
  for (const Row& row : rows) {
    const Cidr cidr{ip(row.network), row.length};
    EXPECT_EQ(cidrContains(cidr, ip(row.address)), row.inside)
        << row.network << "/" << +row.length << " " << row.address;
    PolicyMatch source, not_source, destination, not_destination;
    source.source_ips.any_of = {cidr};
    not_source.source_ips.none_of = {cidr};
    destination.destination_ips.any_of = {cidr};
    not_destination.destination_ips.none_of = {cidr};
    const PolicySubject from = subjectOf(nullptr, row.address, "203.0.113.1");
    const PolicySubject to = subjectOf(nullptr, "203.0.113.1", row.address);
    EXPECT_EQ(policyMatches(policyOf(source), from), row.inside);
    EXPECT_EQ(policyMatches(policyOf(not_source), from), !row.inside);
    EXPECT_EQ(policyMatches(policyOf(destination), to), row.inside);
    EXPECT_EQ(policyMatches(policyOf(not_destination), to), !row.inside);
  }
}

TEST(Authorize, PortsAndLists) {
  PolicyMatch match;
  match.destination_ports.any_of = {80, 443};
  EXPECT_TRUE(policyMatches(policyOf(match), subjectOf(nullptr)));
  EXPECT_FALSE(policyMatches(policyOf(match), subjectOf(nullptr, "1.1.1.1", "2.2.2.2", 81)));
  // Positive and negative of one attribute are ANDed, and attributes with each other.
  match.destination_ports.none_of = {80};
  EXPECT_FALSE(policyMatches(policyOf(match), subjectOf(nullptr)));
  EXPECT_TRUE(policyMatches(policyOf(match), subjectOf(nullptr, "1.1.1.1", "2.2.2.2", 443)));
  match.principals.any_of = {{Kind::kPresence, ""}};
  EXPECT_FALSE(policyMatches(policyOf(match), subjectOf(nullptr, "1.1.1.1", "2.2.2.2", 443)));
  EXPECT_TRUE(policyMatches(policyOf(match), subjectOf(&kMe, "1.1.1.1", "2.2.2.2", 443)));
}

TEST(Authorize, EmptyAndNested) {
  const PolicyMatch yes = principal(Kind::kPresence, ""), no = principal(Kind::kExact, "nobody");
  using Rules = decltype(Policy::rules);
  struct Row {
    const char* name;
    Rules rules;
    bool matches;
  };
  const Row rows[] = {
      {"no rule", {}, false},
      {"a rule without clauses", Rules(1), true},
      {"an empty clause", Rules{{{}}}, true},
      {"an empty match", Rules{{{PolicyMatch{}}}}, false},
      {"an empty match beside one that holds", Rules{{{PolicyMatch{}, yes}}}, true},
      {"matches are ORed", Rules{{{no, yes}}}, true},
      {"clauses are ANDed", Rules{{{yes}, {no}}}, false},
      {"clauses that all hold", Rules{{{yes}, {no, yes}}}, true},
      {"an empty clause beside one that fails", Rules{{{}, {no}}}, false},
      {"rules are ORed", Rules{{{no}}, {{yes}}}, true},
      {"no rule holds", Rules{{{no}}, {{no}}}, false},
  };
  for (const Row& row : rows) {
    Policy policy;
    policy.rules = row.rules;
    EXPECT_EQ(policyMatches(policy, subjectOf(&kMe)), row.matches) << row.name;
  }
}

TEST(Authorize, WhatWasNotUnderstoodFailsClosed) {
  PolicyMatch match = principal(Kind::kPresence, "");
  match.malformed = true;
  EXPECT_FALSE(policyMatches(policyOf(match, Action::kAllow), subjectOf(&kMe)));
  EXPECT_TRUE(policyMatches(policyOf(match, Action::kDeny), subjectOf(&kMe)));
  EXPECT_TRUE(policyMatches(policyOf(match, Action::kDeny), subjectOf(nullptr)));
  PolicyMatch emptied;  // all that it held was not understood
  emptied.malformed = true;
  EXPECT_TRUE(policyMatches(policyOf(emptied, Action::kDeny), subjectOf(&kMe)));
}

// ---- decisions over several policies ----

Policy named(const char* name, Action action, PolicyMatch match, Scope scope = Scope::kWorkload,
             const char* ns = "ns") {
  Policy policy = policyOf(std::move(match), action);
  policy.name = name;
  policy.ns = ns;
  policy.scope = scope;
  return policy;
}

AuthorizationVerdict decide(const std::vector<Policy>& policies, const std::vector<std::string>& keys,
                            const PolicySubject& subject) {
  std::vector<PolicyPtr> put;
  for (const Policy& policy : policies) put.push_back(std::make_shared<const Policy>(policy));
  Workload workload;
  workload.ns = "ns";
  workload.authorization_policies = keys;
  return evaluatePolicies(*PolicySet().with(put, {}), workload, subject);
}

TEST(Authorize, Scopes) {
  const PolicyMatch everybody = nameSpace(Kind::kPrefix, "");
  const auto denied = [&](Scope scope, const char* ns, std::vector<std::string> keys) {
    return !decide({named("p", Action::kDeny, everybody, scope, ns)}, keys, subjectOf(&kMe)).allowed;
  };
  EXPECT_TRUE(denied(Scope::kGlobal, "root", {}));
  EXPECT_TRUE(denied(Scope::kNamespace, "ns", {}));
  EXPECT_FALSE(denied(Scope::kNamespace, "other", {}));
  EXPECT_FALSE(denied(Scope::kWorkload, "ns", {}));
  EXPECT_TRUE(denied(Scope::kWorkload, "ns", {"ns/p"}));
  EXPECT_TRUE(denied(Scope::kWorkload, "root", {"root/p"}));
}

TEST(Authorize, OrderOfActions) {
  const Policy allow = named("allow", Action::kAllow, principal(Kind::kExact, "td/ns/ns/sa/me"));
  const Policy deny = named("deny", Action::kDeny, principal(Kind::kExact, "td/ns/ns/sa/me"));
  EXPECT_TRUE(decide({}, {}, subjectOf(nullptr)).allowed);
  auto verdict = decide({allow}, {"ns/allow"}, subjectOf(&kMe));
  EXPECT_TRUE(verdict.allowed);
  EXPECT_EQ(verdict.policy, "ns/allow");
  EXPECT_EQ(verdict.reason, Reason::kNone);
  verdict = decide({allow}, {"ns/allow"}, subjectOf(&kOther));
  EXPECT_FALSE(verdict.allowed);
  EXPECT_EQ(verdict.reason, Reason::kPolicyNoAllow);
  verdict = decide({allow, deny}, {"ns/allow", "ns/deny"}, subjectOf(&kMe));
  EXPECT_FALSE(verdict.allowed);
  EXPECT_EQ(verdict.reason, Reason::kPolicyDenied);
  EXPECT_EQ(verdict.policy, "ns/deny");
  EXPECT_TRUE(decide({deny}, {"ns/deny"}, subjectOf(&kOther)).allowed);
  // ALLOW without rules refuses everybody, DENY without rules nobody.
  Policy nothing;
  nothing.name = "nothing";
  nothing.ns = "ns";
  EXPECT_EQ(decide({nothing}, {"ns/nothing"}, subjectOf(&kMe)).reason, Reason::kPolicyNoAllow);
  nothing.action = Action::kDeny;
  EXPECT_TRUE(decide({nothing}, {"ns/nothing"}, subjectOf(&kMe)).allowed);
}

TEST(Authorize, UnknownPolicyRefuses) {
  const Policy allow = named("allow", Action::kAllow, principal(Kind::kPresence, ""));
  const auto verdict = decide({allow}, {"ns/allow", "ns/missing"}, subjectOf(&kMe));
  EXPECT_FALSE(verdict.allowed);
  EXPECT_EQ(verdict.reason, Reason::kPolicyUnknown);
  EXPECT_EQ(verdict.policy, "ns/missing");
}

TEST(Authorize, DryRunOnlyReports) {
  Policy deny = named("deny", Action::kDeny, principal(Kind::kPresence, ""));
  deny.dry_run = true;
  auto verdict = decide({deny}, {"ns/deny"}, subjectOf(&kMe));
  EXPECT_TRUE(verdict.allowed);
  EXPECT_EQ(verdict.dry_run, std::vector<std::string>{"ns/deny"});
  EXPECT_TRUE(decide({deny}, {"ns/deny"}, subjectOf(nullptr)).dry_run.empty());
  Policy allow = named("allow", Action::kAllow, principal(Kind::kExact, "td/ns/ns/sa/me"));
  allow.dry_run = true;
  EXPECT_TRUE(decide({allow}, {"ns/allow"}, subjectOf(&kMe)).dry_run.empty());
  verdict = decide({allow}, {"ns/allow"}, subjectOf(&kOther));
  EXPECT_TRUE(verdict.allowed);  // a dry-run ALLOW does not make others necessary
  EXPECT_EQ(verdict.dry_run, std::vector<std::string>{"ns/allow"});
  const Policy strict = named("strict", Action::kAllow, principal(Kind::kExact, "nobody"));
  verdict = decide({allow, strict}, {"ns/allow", "ns/strict"}, subjectOf(&kMe));
  EXPECT_FALSE(verdict.allowed);
  EXPECT_EQ(verdict.dry_run, std::vector<std::string>{"ns/allow"});
}

TEST(Authorize, StrictAndItsPortExceptions) {
  const PolicyMatch plaintext = principal(Kind::kPresence, "", true);
  const Policy strict =
      named("istio_converted_static_strict", Action::kDeny, plaintext, Scope::kWorkload, "root");
  const std::vector<std::string> keys{"root/istio_converted_static_strict"};
  EXPECT_EQ(decide({strict}, keys, subjectOf(nullptr)).reason, Reason::kPolicyDenied);
  EXPECT_TRUE(decide({strict}, keys, subjectOf(&kMe)).allowed);
  // STRICT but for port 9090: one rule of two clauses.
  PolicyMatch not_9090;
  not_9090.destination_ports.none_of = {9090};
  Policy excepted = named("converted", Action::kDeny, plaintext);
  excepted.rules = {{{plaintext}, {not_9090}}};
  const auto at = [&](const Identity* peer, uint16_t port) {
    return decide({excepted}, {"ns/converted"}, subjectOf(peer, "10.1.2.3", "10.0.0.1", port)).allowed;
  };
  EXPECT_FALSE(at(nullptr, 80));
  EXPECT_TRUE(at(nullptr, 9090));
  EXPECT_TRUE(at(&kMe, 80));
  // PERMISSIVE with one strict port.
  PolicyMatch strict_port = plaintext;
  strict_port.destination_ports.any_of = {8443};
  excepted.rules = {{{strict_port}}};
  EXPECT_TRUE(at(nullptr, 80));
  EXPECT_FALSE(at(nullptr, 8443));
  EXPECT_TRUE(at(&kMe, 8443));
}

}  // namespace
}  // namespace ebbtide
