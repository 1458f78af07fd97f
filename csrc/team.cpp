#include "team.h"

#include <system_error>

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

void pause_briefly() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// About 50 microseconds on the machines seen. With more threads than cores, spinning only delays the one
// waited for.
int spins_for(int num_threads) {
  const unsigned cores = std::thread::hardware_concurrency();
  return cores != 0 && static_cast<unsigned>(num_threads) > cores ? 0 : 1000;
}

void pin(std::thread& thread, int cpu) {
#if defined(__linux__)
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu, &set);
  const int error = pthread_setaffinity_np(thread.native_handle(), sizeof set, &set);
  if (error != 0) throw std::system_error(error, std::generic_category());
#else
  (void)thread, (void)cpu;
  throw std::system_error(std::make_error_code(std::errc::not_supported));
#endif
}

}  // namespace

Team::Team(int num_threads, const int* cpus) : size_(num_threads), num_spins_(spins_for(num_threads)) {
  threads_.reserve(num_threads - 1);
  try {
    start(num_threads, cpus);
  } catch (...) {
    is_closing_ = true;
    advance(job_);
    for (std::thread& thread : threads_) thread.join();
    throw;
  }
}

Team::~Team() {
  is_closing_ = true;
  advance(job_);
  for (std::thread& thread : threads_) thread.join();
}

void Team::start(int num_threads, const int* cpus) {
  for (int t = 1; t < num_threads; ++t) {
    threads_.emplace_back([this, t] { work(t); });
    if (cpus != nullptr) pin(threads_.back(), cpus[t]);
  }
}

void Team::run(Function function, void* argument) {
  function_ = function;
  argument_ = argument;
  next_item_ = 0;
  advance(job_);
  function(argument, 0);
  barrier();
}

void Team::work(int thread) {
  for (unsigned job = 0;; ++job) {
    wait_while(job_, job);
    if (is_closing_) return;
    function_(argument_, thread);
    barrier();
  }
}

void Team::barrier() {
  const unsigned round = round_;
  if (num_arrived_.fetch_add(1) + 1 == size_) {
    num_arrived_ = 0;
    next_item_ = 0;
    advance(round_);
  } else {
    wait_while(round_, round);
  }
}

void Team::wait_while(const std::atomic<unsigned>& counter, unsigned value) {
  for (int i = 0; i < num_spins_; ++i) {
    if (counter != value) return;
    pause_briefly();
  }
  // Sequential consistency of num_asleep_ and the counter: either the one who advances sees us, or we see
  // that.
  std::unique_lock<std::mutex> lock(mutex_);
  ++num_asleep_;
  changed_.wait(lock, [&] { return counter != value; });
  --num_asleep_;
}

void Team::advance(std::atomic<unsigned>& counter) {
  ++counter;
  if (num_asleep_ > 0) {
    std::lock_guard<std::mutex> lock(mutex_);
    changed_.notify_all();
  }
}
