// Zeroed memory from the system, aligned for huge pages where they help.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstring>
#include <new>
#include <utility>

class Memory {
 public:
  Memory() = default;

  // Throws std::bad_alloc. Pages that are never touched cost nothing.
  explicit Memory(std::size_t num_bytes)
      : num_bytes_((num_bytes + kHugePage - 1) / kHugePage * kHugePage + kHugePage) {
#if defined(__SANITIZE_ADDRESS__)
    num_bytes_ = num_bytes;  // no more than was asked for: the sanitizer watches its ends
    start_ = ::operator new(num_bytes_, std::align_val_t{4096});
    std::memset(start_, 0, num_bytes_);
#else
    void* start = mmap(nullptr, num_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start == MAP_FAILED) throw std::bad_alloc();
    start_ = start;
#ifdef MADV_HUGEPAGE
    madvise(start_, num_bytes_, MADV_HUGEPAGE);  // refused on some kernels: only slower
#endif
#endif
  }

  Memory(Memory&& other) noexcept : start_(other.start_), num_bytes_(other.num_bytes_) {
    other.start_ = nullptr;
  }

  Memory& operator=(Memory&& other) noexcept {
    std::swap(start_, other.start_);
    std::swap(num_bytes_, other.num_bytes_);
    return *this;
  }

  ~Memory() {
#if defined(__SANITIZE_ADDRESS__)
    ::operator delete(start_, std::align_val_t{4096});
#else
    if (start_ != nullptr) munmap(start_, num_bytes_);
#endif
  }

  char* data() const {
#if defined(__SANITIZE_ADDRESS__)
    return static_cast<char*>(start_);
#else
    const std::size_t address = reinterpret_cast<std::size_t>(start_);
    return reinterpret_cast<char*>((address + kHugePage - 1) / kHugePage * kHugePage);
#endif
  }

 private:
  static constexpr std::size_t kHugePage = std::size_t{1} << 21;
  void* start_ = nullptr;
  std::size_t num_bytes_ = 0;
};
