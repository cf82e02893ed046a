#include "forks.hpp"

#include <pthread.h>

#include <atomic>
#include <system_error>

#include "pool.hpp"

namespace isthmus {
namespace {

std::atomic<std::uint32_t> forks{0};

int register_handlers() {
    return pthread_atfork([] { Pool::shared().before_fork(); }, [] { Pool::shared().after_fork(); },
                          [] {
                              Pool::shared().after_fork();
                              forks.fetch_add(1);
                          });
}

}  // namespace

void watch_forks() {
    static const int failure = register_handlers();
    if (failure != 0) throw std::system_error(failure, std::generic_category(), "pthread_atfork");
}

std::uint32_t fork_generation() noexcept { return forks.load(std::memory_order_relaxed); }

}  // namespace isthmus
