// What the package needs of libcuda.so.1: host functions of a stream, run late by a thread, in order.
// After an error none runs any more, as with a real driver.
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>
#include <utility>

typedef void (*HostFunction)(void*);

namespace {
// Never destroyed: the thread waits on them until the process is gone.
auto& queue = *new std::deque<std::pair<HostFunction, void*>>;
auto& mutex = *new std::mutex;
auto& changed = *new std::condition_variable;
bool running = false;
std::atomic<int> status{0}, held{0}, delay_us{5000};

void run() {
  std::unique_lock<std::mutex> lock(mutex);
  for (;;) {
    changed.wait(lock, [] { return !queue.empty() && !held; });
    const auto [function, data] = queue.front();
    running = true;
    lock.unlock();
    std::this_thread::sleep_for(std::chrono::microseconds(delay_us));
    if (!status) function(data);
    lock.lock();
    queue.pop_front();
    running = false;
    changed.notify_all();
  }
}
}  // namespace

extern "C" {
int cuLaunchHostFunc(void*, HostFunction function, void* data) {
  static std::once_flag started;
  std::call_once(started, [] { std::thread(run).detach(); });
  if (status) return status;
  const std::lock_guard<std::mutex> lock(mutex);
  queue.emplace_back(function, data);
  changed.notify_all();
  return 0;
}

// For tests: the status of all calls from now on; whether functions wait; how long each takes.
void fake_cuda_fail(int with) { status = with; }
void fake_cuda_hold(int on) {
  const std::lock_guard<std::mutex> lock(mutex);
  held = on;
  changed.notify_all();
}
void fake_cuda_delay(int us) { delay_us = us; }
// Waits until all functions have run.
void fake_cuda_drain() {
  std::unique_lock<std::mutex> lock(mutex);
  changed.wait(lock, [] { return queue.empty() && !running; });
}
}
