// Intrusive doubly linked list: membership without allocation, and leaving it by destruction.
#pragma once

namespace ebbtide {

// A member of at most one list. `self` is the object that contains the hook.
template <typename T>
class ListHook {
 public:
  explicit ListHook(T* self = nullptr) : self_(self) {}
  ~ListHook() { unlink(); }
  ListHook(const ListHook&) = delete;
  ListHook& operator=(const ListHook&) = delete;

  bool linked() const { return next_ != this; }
  void unlink() {
    prev_->next_ = next_;
    next_->prev_ = prev_;
    prev_ = next_ = this;
  }

 private:
  template <typename U>
  friend class List;
  T* self_;
  ListHook* prev_ = this;
  ListHook* next_ = this;
};

template <typename T>
class List {
 public:
  bool empty() const { return !root_.linked(); }
  void pushBack(ListHook<T>& hook) {
    hook.unlink();
    hook.prev_ = root_.prev_;
    hook.next_ = &root_;
    root_.prev_->next_ = &hook;
    root_.prev_ = &hook;
  }
  // Null when empty.
  T* front() const { return root_.next_->self_; }
  T* popFront() {
    T* first = front();
    if (first != nullptr) root_.next_->unlink();
    return first;
  }
  // The first that fits; null when none does.
  template <typename F>
  T* find(F fits) const {
    for (auto* hook = root_.next_; hook != &root_; hook = hook->next_) {
      if (fits(*hook->self_)) return hook->self_;
    }
    return nullptr;
  }
  // Moves all members to the end of `other`.
  void moveTo(List& other) {
    if (empty()) return;
    root_.next_->prev_ = other.root_.prev_;
    other.root_.prev_->next_ = root_.next_;
    root_.prev_->next_ = &other.root_;
    other.root_.prev_ = root_.prev_;
    root_.next_ = root_.prev_ = &root_;
  }
  // `visit` may unlink the member it is given, no other.
  template <typename F>
  void forEach(F visit) {
    for (auto* hook = root_.next_; hook != &root_;) {
      auto* next = hook->next_;
      visit(*hook->self_);
      hook = next;
    }
  }

 private:
  ListHook<T> root_;
};

}  // namespace ebbtide
