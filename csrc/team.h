// A team of threads that lives as long as its model: the caller of run() is thread 0, the others wait for it,
// spinning for a moment (the next step or phase is usually near) and then asleep.
#pragma once

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

class Team {
 public:
  using Function = void (*)(void* argument, int thread);

  // Thread t runs on CPU cpus[t], where they are given, but for the caller's, which is not ours to move. Throws
  // std::system_error when the threads cannot be started, or may not run there.
  explicit Team(int num_threads, const int* cpus = nullptr);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int size() const { return size_; }

  // Calls function(argument, t) for t = 0 .. size - 1 at the same time; returns when all have.
  void run(Function function, void* argument);

  // Inside run(): wait until all threads are here. Also starts the next count of take().
  void barrier();

  // Inside run(): the next of the items 0, 1, ... that the threads share out since the last barrier.
  int take() { return next_item_.fetch_add(1, std::memory_order_relaxed); }

 private:
  void start(int num_threads, const int* cpus);
  void work(int thread);
  void wait_while(const std::atomic<unsigned>& counter, unsigned value);
  void advance(std::atomic<unsigned>& counter);

  const int size_;
  const int num_spins_;
  Function function_ = nullptr;
  void* argument_ = nullptr;
  alignas(64) std::atomic<unsigned> job_{0};
  alignas(64) std::atomic<unsigned> round_{0};
  alignas(64) std::atomic<int> num_arrived_{0};
  alignas(64) std::atomic<int> next_item_{0};
  alignas(64) std::atomic<int> num_asleep_{0};
  std::atomic<bool> is_closing_{false};
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<std::thread> threads_;
};

// Inside Team::run(): body(i, next) for every i in 0 .. num_items - 1, shared out, then a barrier. `next` is
// the item that this thread takes next, num_items or more when there is none.
template <class Body>
void for_each_ahead(Team& team, int num_items, const Body& body) {
  for (int i = team.take(); i < num_items;) {
    const int next = team.take();
    body(i, next);
    i = next;
  }
  team.barrier();
}

// The same without looking ahead: nothing is taken before it can be begun.
template <class Body>
void for_each(Team& team, int num_items, const Body& body) {
  for (int i = team.take(); i < num_items; i = team.take()) body(i);
  team.barrier();
}
