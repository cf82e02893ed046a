// engine.cpp: setting up, driving, and the life of a channel. Messages themselves: messages.cpp.
#include "engine.hpp"

#include <sched.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <system_error>

#include "forks.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace isthmus {
namespace {

constexpr std::uint64_t descriptor_check_ns = 30'000;  // how late a dead peer may be noticed while spinning
constexpr std::uint64_t nap_ns = 500'000'000;          // longest sleep without a look for signals
constexpr std::uint64_t drain_dead_ns = 50'000'000;    // for the last words of a peer that died
constexpr std::uint64_t drain_orderly_ns = 1'000'000'000;  // ... of one that said how many there are
constexpr std::uint64_t linger_ns = 1'000'000'000;         // how long close() waits for our own last words
constexpr unsigned quiet_rounds_enough = 3;
constexpr unsigned rounds_per_clock = 16;
constexpr unsigned lock_rounds = 200;         // tries before a thread sleeps until the driver lets go
constexpr unsigned busy_rounds_brief = 16;    // a queue that is full for a moment only
constexpr unsigned busy_rounds_long = 2'000;  // some milliseconds: from then on nap 1 ms each
constexpr std::size_t ready_max = 64;
constexpr const char* queue_slots = "1024";
constexpr std::uint32_t channel_ids_max = 1U << 24;

void relax() {
#if defined(__x86_64__)
    _mm_pause();
#endif
}

void check(const UcxLibrary& ucx, ucs_status_t status, const char* what) {
    if (status != UCS_OK) throw std::runtime_error(std::string(what) + ": " + ucx.ucs_status_string(status));
}

// Shared-memory queues with room for several full channels: with UCX's own 256 slots, the frames of one that
// has all its credits in flight wait in UCX (13 % slower on a shared core). What the site has set stays.
void widen_queues(const UcxLibrary& ucx, ucp_config_t* config) {
    for (const char* name : {"POSIX_FIFO_SIZE", "SYSV_FIFO_SIZE"}) {
        if (std::getenv((std::string("UCX_") + name).c_str()) == nullptr)
            ucx.ucp_config_modify(config, name, queue_slots);
    }
}

// What a UCX print function writes.
template <typename Print>
std::string captured(Print print) {
    char* text = nullptr;
    std::size_t length = 0;
    FILE* stream = open_memstream(&text, &length);
    if (stream == nullptr) return {};
    print(stream);
    std::fclose(stream);
    std::string result(text, length);
    std::free(text);
    return result;
}

}  // namespace

std::uint64_t now_ns() {
    return static_cast<std::uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(
                                          std::chrono::steady_clock::now().time_since_epoch())
                                          .count());
}

// setting up
// ------------------------------------------------------------------------------------------------------
Engine::Engine(const UcxLibrary& ucx) : ucx_(ucx) {
    watch_forks();
    forks_ = fork_generation();
    try {
        open_worker();
        open_descriptors();
    } catch (...) {
        free_worker();
        throw;
    }
}

Engine::~Engine() {
    if (usable()) {
        close();
    } else {  // UCX's state belongs to the parent: forget it, whatever it holds
        for (auto& sending : sendings_) static_cast<void>(sending.release());
    }
}

bool Engine::usable() const { return forks_ == fork_generation(); }

void Engine::open_worker() {
    ucp_config_t* config = nullptr;
    check(ucx_, ucx_.ucp_config_read(nullptr, nullptr, &config), "UCX settings");
    widen_queues(ucx_, config);
    ucp_params_t params{};
    params.field_mask = UCP_PARAM_FIELD_FEATURES | UCP_PARAM_FIELD_NAME;
    params.features = UCP_FEATURE_AM | UCP_FEATURE_WAKEUP;
    params.name = "isthmus";
    const ucs_status_t status =
        ucx_.ucp_init_version(UcxLibrary::api_major, UcxLibrary::api_minor, &params, config, &context_);
    ucx_.ucp_config_release(config);
    check(ucx_, status, "UCX context");

    ucp_worker_params_t worker_params{};
    worker_params.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE;
    worker_params.thread_mode = UCS_THREAD_MODE_SERIALIZED;
    check(ucx_, ucx_.ucp_worker_create(context_, &worker_params, &worker_), "UCX worker");

    ucp_worker_attr_t attributes{};
    attributes.field_mask = UCP_WORKER_ATTR_FIELD_MAX_AM_HEADER;
    check(ucx_, ucx_.ucp_worker_query(worker_, &attributes), "UCX worker");
    if (attributes.max_am_header < sizeof(FrameHeader) + sizeof(std::uint64_t))
        throw std::runtime_error("no UCX transport in use can carry a 64-byte header");
    meta_inline_max_ =
        std::min(attributes.max_am_header - sizeof(FrameHeader), std::size_t{Sending::meta_inline_bytes}) -
        sizeof(std::uint64_t);

    ucp_am_handler_param_t handler{};
    handler.field_mask = UCP_AM_HANDLER_PARAM_FIELD_ID | UCP_AM_HANDLER_PARAM_FIELD_CB |
                         UCP_AM_HANDLER_PARAM_FIELD_ARG | UCP_AM_HANDLER_PARAM_FIELD_FLAGS;
    handler.id = message_id;
    handler.flags = UCP_AM_FLAG_WHOLE_MSG;
    handler.cb = on_message;
    handler.arg = this;
    check(ucx_, ucx_.ucp_worker_set_am_recv_handler(worker_, &handler), "UCX active messages");
}

void Engine::open_descriptors() {
    check(ucx_, ucx_.ucp_worker_get_efd(worker_, &ucx_fd_), "UCX event descriptor");
    epoll_fd_ = epoll_create1(EPOLL_CLOEXEC);
    wake_fd_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (epoll_fd_ < 0 || wake_fd_ < 0) throw std::system_error(errno, std::generic_category(), "epoll");
    watch(ucx_fd_, EPOLLIN);
    watch(wake_fd_, EPOLLIN);
}

void Engine::close() {
    if (worker_ == nullptr) return;
    for (std::size_t id = 0; id < channels_.size(); ++id)
        if (const std::shared_ptr<Channel> channel = channels_[id]) close(*channel);
    lock_outside();
    free_worker();
    lock_.unlock();
}

void Engine::free_worker() {
    if (worker_ != nullptr) ucx_.ucp_worker_destroy(std::exchange(worker_, nullptr));
    if (context_ != nullptr) ucx_.ucp_cleanup(std::exchange(context_, nullptr));
    for (auto& sending : sendings_)
        if (void* owner = std::exchange(sending->owner, nullptr)) released_.push_back(owner);
    has_released_ = !released_.empty();
    for (Receiving* receiving : receivings_) delete receiving;
    receivings_.clear();
    if (epoll_fd_ >= 0) ::close(std::exchange(epoll_fd_, -1));
    if (wake_fd_ >= 0) ::close(std::exchange(wake_fd_, -1));
}

std::vector<std::byte> Engine::address() {
    lock_outside();
    const std::lock_guard guard(lock_, std::adopt_lock);
    ucp_address_t* address = nullptr;
    std::size_t length = 0;
    check(ucx_, ucx_.ucp_worker_get_address(worker_, &address, &length), "UCX address");
    const auto* bytes = reinterpret_cast<const std::byte*>(address);
    std::vector<std::byte> copy(bytes, bytes + length);
    ucx_.ucp_worker_release_address(worker_, address);
    return copy;
}

std::string Engine::describe() {
    lock_outside();
    const std::lock_guard guard(lock_, std::adopt_lock);
    return captured([this](FILE* stream) { ucx_.ucp_context_print_info(context_, stream); });
}

std::string Engine::describe(Channel& channel) {
    lock_outside();
    const std::lock_guard guard(lock_, std::adopt_lock);
    if (channel.endpoint == nullptr) return {};
    return captured([&](FILE* stream) { ucx_.ucp_ep_print_info(channel.endpoint, stream); });
}

// driving
// ---------------------------------------------------------------------------------------------------------
void Engine::lock_outside() {
    if (lock_.try_lock()) return;
    lock_wanted_.fetch_add(1);  // the spinning driver makes room, soon enough not to sleep for it
    bool locked = false;
    for (unsigned round = 0; round < lock_rounds && !locked; ++round) {
        relax();
        locked = lock_.try_lock();
    }
    if (!locked) lock_.lock();
    lock_wanted_.fetch_sub(1);
}

void Engine::await(const Channel& channel, std::uint64_t call_id) {
    awaited_.active = true;
    awaited_.ready = false;
    awaited_.channel_id = channel.id;
    awaited_.call_id = call_id;
}

void Engine::stop_awaiting() {
    if (awaited_.active) {  // written by the driver alone; once it is false, the answer is the driver's too
        const std::lock_guard guard(lock_);
        awaited_.active = awaited_.ready = false;
    }
    awaited_.answer.clear();
}

Outcome Engine::look() {
    if (!ready_.empty()) return Outcome::attention;
    if (awaited_.active) {
        if (awaited_.ready) {
            awaited_.active = awaited_.ready = false;
            return Outcome::answer;
        }
        const Channel* channel = find(awaited_.channel_id);
        if (channel == nullptr || !channel->alive.load(std::memory_order_relaxed)) return Outcome::lost;
    } else if (!inbox_.empty()) {
        return Outcome::message;
    }
    if (has_native_failures_.load(std::memory_order_relaxed)) return Outcome::attention;
    if (wake_wanted_.load(std::memory_order_relaxed)) return Outcome::woken;
    if (!awaited_.active && turns_wanted.load(std::memory_order_relaxed) != 0) return Outcome::woken;
    return Outcome::nothing;
}

Outcome Engine::progress() {
    ucx_.ucp_worker_progress(worker_);
    if (has_failed_.load(std::memory_order_relaxed)) bury_failed();
    return look();
}

Outcome Engine::glance(std::uint64_t time_ns) {
    if (time_ns - checked_ns_ > descriptor_check_ns) {
        checked_ns_ = time_ns;
        check_descriptors(0);
    }
    const std::lock_guard guard(lock_);
    const Outcome outcome = look();
    return outcome == Outcome::nothing ? progress() : outcome;
}

Outcome Engine::last_look() {
    checked_ns_ = now_ns();
    check_descriptors(0);
    const std::lock_guard guard(lock_);
    return look();
}

Outcome Engine::spin(std::uint64_t start_ns, std::uint64_t until_ns) {
    Outcome outcome = Outcome::nothing;
    std::uint64_t time_ns = start_ns;
    while (outcome == Outcome::nothing && time_ns < until_ns) {
        outcome = spin_rounds();
        time_ns = now_ns();
        if (outcome != Outcome::nothing || time_ns - checked_ns_ <= descriptor_check_ns) continue;
        checked_ns_ = time_ns;
        check_descriptors(0);
        sched_yield();  // the one we wait for may need this very core
    }
    counters.spin_ns.fetch_add(time_ns - start_ns, std::memory_order_relaxed);
    return outcome;
}

// As many as are worth one look at the clock, without letting go of the lock unless somebody wants it.
Outcome Engine::spin_rounds() {
    const std::lock_guard guard(lock_);
    Outcome outcome = Outcome::nothing;
    for (unsigned round = 0; round < rounds_per_clock && outcome == Outcome::nothing; ++round) {
        if (lock_wanted_.load(std::memory_order_relaxed) != 0) make_room();
        outcome = progress();
    }
    return outcome;
}

void Engine::make_room() {
    lock_.unlock();
    while (lock_wanted_.load(std::memory_order_relaxed) != 0) relax();
    lock_.lock();
}

Outcome Engine::sleep(std::uint64_t until_ns) {
    const std::uint64_t nap_until_ns = now_ns() + nap_ns;
    const std::uint64_t native_calls = counters.native_calls.load(std::memory_order_relaxed);
    for (unsigned busy_rounds = 0;;) {
        bool busy = false;
        {
            const std::lock_guard guard(lock_);
            if (const Outcome outcome = progress(); outcome != Outcome::nothing) return outcome;
            if (counters.native_calls.load(std::memory_order_relaxed) != native_calls)
                return Outcome::interrupted;
            busy = ucx_.ucp_worker_arm(worker_) == UCS_ERR_BUSY;
        }
        if (busy && ++busy_rounds < busy_rounds_brief) continue;
        const std::uint64_t time_ns = now_ns();
        if (time_ns >= until_ns) return Outcome::nothing;
        if (time_ns >= nap_until_ns) return Outcome::interrupted;
        errno = 0;
        if (busy) {
            make_way(busy_rounds);
        } else {
            const std::uint64_t left_ns = std::min(until_ns, nap_until_ns) - time_ns;
            counters.sleeps.fetch_add(1, std::memory_order_relaxed);
            check_descriptors(static_cast<int>((left_ns + 999'999) / 1'000'000));
        }
        checked_ns_ = now_ns();
        if (errno == EINTR) return Outcome::interrupted;
    }
}

// UCX will not be armed while a send waits for room in the peer's queue, and nothing tells when there is
// some: the peer may need this very core to make it, or may be stopped for long.
void Engine::make_way(unsigned busy_rounds) {
    const bool long_busy = busy_rounds > busy_rounds_long;
    check_descriptors(long_busy ? 1 : 0);
    if (!long_busy) sched_yield();
}

void Engine::check_descriptors(int timeout_ms) {
    std::array<epoll_event, ready_max> events;
    const int count = epoll_wait(epoll_fd_, events.data(), static_cast<int>(events.size()), timeout_ms);
    for (int index = 0; index < count; ++index) {
        const epoll_event& event = events[static_cast<std::size_t>(index)];
        if (event.data.fd == ucx_fd_) continue;
        if (event.data.fd == wake_fd_) {
            std::uint64_t wakes = 0;
            static_cast<void>(!::read(wake_fd_, &wakes, sizeof wakes));
            continue;
        }
        ready_.push_back({event.data.fd, event.events});
    }
}

bool Engine::take(Message& message) {
    const std::lock_guard guard(lock_);
    if (inbox_.empty()) return false;
    message = std::move(inbox_.front());
    inbox_.pop();
    return true;
}

void Engine::wake() {
    wake_wanted_.store(true, std::memory_order_release);
    interrupt();
}

void Engine::interrupt() {
    const std::uint64_t one = 1;
    static_cast<void>(!::write(wake_fd_, &one, sizeof one));
}

void Engine::watch(int descriptor, std::uint32_t events) {
    epoll_event event{};
    event.events = events;
    event.data.fd = descriptor;
    if (epoll_ctl(epoll_fd_, EPOLL_CTL_ADD, descriptor, &event) == 0) return;
    if (errno != EEXIST || epoll_ctl(epoll_fd_, EPOLL_CTL_MOD, descriptor, &event) != 0)
        throw std::system_error(errno, std::generic_category(), "epoll_ctl");
}

void Engine::unwatch(int descriptor) {
    epoll_ctl(epoll_fd_, EPOLL_CTL_DEL, descriptor, nullptr);
    std::erase_if(ready_, [&](const Ready& ready) { return ready.descriptor == descriptor; });
}

std::vector<void*> Engine::take_released() {
    lock_outside();
    const std::lock_guard guard(lock_, std::adopt_lock);
    has_released_ = false;
    return std::exchange(released_, {});
}

std::vector<NativeFailure> Engine::take_native_failures() {
    lock_outside();
    const std::lock_guard guard(lock_, std::adopt_lock);
    has_native_failures_ = false;
    return std::exchange(native_failures_, {});
}

// channels
// --------------------------------------------------------------------------------------------------------
Channel* Engine::find(std::uint32_t channel_id) {
    return channel_id < channels_.size() ? channels_[channel_id].get() : nullptr;
}

std::shared_ptr<Channel> Engine::open(std::uint32_t id, std::uint64_t key) {
    lock_outside();
    const std::lock_guard guard(lock_, std::adopt_lock);
    if (id >= channel_ids_max || find(id) != nullptr)
        throw std::invalid_argument("channel id taken or out of range");
    if (id >= channels_.size()) channels_.resize(id + 1);
    return channels_[id] = std::make_shared<Channel>(id, key);
}

void Engine::attach(Channel& channel, std::uint32_t peer_id, std::uint64_t peer_key, Bytes peer_address,
                    bool recovers) {
    lock_outside();
    const std::lock_guard guard(lock_, std::adopt_lock);
    if (worker_ == nullptr) throw std::runtime_error("the domain is closed");
    close_endpoint(channel);
    channel.peer_id = peer_id;
    channel.peer_key = peer_key;
    channel.recovers = recovers;
    ucp_ep_params_t params{};
    params.field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS | UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE |
                        UCP_EP_PARAM_FIELD_ERR_HANDLER;
    params.address = reinterpret_cast<const ucp_address_t*>(peer_address.data());
    params.err_mode = recovers ? UCP_ERR_HANDLING_MODE_PEER : UCP_ERR_HANDLING_MODE_NONE;
    params.err_handler.cb = on_failure;
    params.err_handler.arg = this;
    check(ucx_, ucx_.ucp_ep_create(worker_, &params, &channel.endpoint), "UCX endpoint");
}

int Engine::open_arena(Channel& channel) {
    auto arena = std::make_unique<Arena>();
    const int descriptor = arena->take_descriptor();
    lock_outside();
    const std::lock_guard guard(lock_, std::adopt_lock);
    channel.arena = std::move(arena);
    return descriptor;
}

void Engine::define(Channel& channel, std::uint32_t function_id, NativeSymbol symbol,
                    std::size_t result_bytes_max, const Meter& meter) {
    Buffer result = Buffer::of(std::max<std::size_t>(result_bytes_max, 1));
    if (!result) throw std::bad_alloc();
    lock_outside();
    const std::lock_guard guard(lock_, std::adopt_lock);
    std::erase_if(channel.functions,
                  [&](const NativeFunction& known) { return known.function_id == function_id; });
    channel.functions.push_back(
        {.function_id = function_id, .symbol = symbol, .result = std::move(result), .meter = meter});
    has_functions_ = true;
}

void Engine::on_failure(void* self, ucp_ep_h endpoint, ucs_status_t status) {
    auto& engine = *static_cast<Engine*>(self);  // called within progress, so the lock is held
    for (const auto& channel : engine.channels_) {
        if (channel == nullptr || channel->endpoint != endpoint) continue;
        channel->lost_because = engine.ucx_.ucs_status_string(status);
        channel->failed = true;
        engine.has_failed_ = true;
    }
}

void Engine::bury_failed() {
    has_failed_ = false;
    for (std::size_t id = 0; id < channels_.size(); ++id) {
        const std::shared_ptr<Channel> channel = channels_[id];
        if (channel != nullptr && channel->failed.exchange(false))
            lose_locked(*channel, channel->lost_because, 0);
    }
}

void Engine::lose(Channel& channel, std::string_view reason, std::uint64_t frames_expected) {
    lock_outside();
    const std::lock_guard guard(lock_, std::adopt_lock);
    lose_locked(channel, reason, frames_expected);
}

void Engine::lose_locked(Channel& channel, std::string_view reason, std::uint64_t frames_expected) {
    if (channel.closed || !channel.alive) return;
    if (channel.endpoint != nullptr) drain(channel, frames_expected);
    if (!channel.alive.exchange(false)) return;
    close_endpoint(channel);
    channel.arrivals.clear();
    Message& message = inbox_.push();
    message.header = {};
    message.header.kind = Kind::lost;
    message.header.channel_id = channel.id;
    const std::string_view text = reason.substr(0, Message::small_bytes);
    message.set_meta(std::as_bytes(std::span(text.data(), text.size())));
}

// Take in what the peer had sent before it went: all of it when it told how much, else until nothing more
// comes.
void Engine::drain(Channel& channel, std::uint64_t frames_expected) {
    const std::uint64_t until_ns = now_ns() + (frames_expected != 0 ? drain_orderly_ns : drain_dead_ns);
    for (unsigned quiet = 0; now_ns() < until_ns && !channel.failed;) {
        quiet = ucx_.ucp_worker_progress(worker_) == 0 ? quiet + 1 : 0;
        const bool complete =
            frames_expected != 0 ? channel.sequence_in >= frames_expected : channel.arrivals.empty();
        if (complete && (frames_expected != 0 || quiet >= quiet_rounds_enough)) return;
    }
}

void Engine::close(Channel& channel) {
    lock_outside();
    const std::lock_guard guard(lock_, std::adopt_lock);
    if (channel.closed) return;
    channel.closed = true;
    if (channel.alive && channel.endpoint != nullptr) settle_sends(channel);
    channel.alive = false;
    close_endpoint(channel);
    channel.arrivals.clear();
    channel.arena.reset();
    channel.arena_in.reset();
    if (find(channel.id) == &channel) channels_[channel.id].reset();
    if (!inbox_.empty()) interrupt();  // progress made here may have brought frames for a driver that sleeps
}

// Our last frames must have left before the endpoint goes.
void Engine::settle_sends(Channel& channel) {
    const std::uint64_t until_ns = now_ns() + linger_ns;
    while (channel.sends_outstanding != 0 && !channel.failed && now_ns() < until_ns)
        ucx_.ucp_worker_progress(worker_);
    if (channel.failed || channel.sends_outstanding != 0) return;
    ucp_request_param_t param{};
    void* flush = ucx_.ucp_ep_flush_nbx(channel.endpoint, &param);
    if (!UCS_PTR_IS_PTR(flush)) return;
    while (ucx_.ucp_request_check_status(flush) == UCS_INPROGRESS && !channel.failed && now_ns() < until_ns)
        ucx_.ucp_worker_progress(worker_);
    ucx_.ucp_request_free(flush);
}

void Engine::close_endpoint(Channel& channel) {
    ucp_ep_h endpoint = std::exchange(channel.endpoint, nullptr);
    if (endpoint == nullptr || worker_ == nullptr) return;
    // Without recovery closing means flushing, which a dead peer's full queue would never let end: such an
    // endpoint stays until the worker goes.
    if (!channel.recovers && channel.sends_outstanding != 0) return;
    ucp_request_param_t param{};
    param.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS;
    param.flags = channel.recovers ? UCP_EP_CLOSE_FLAG_FORCE : 0;
    // Given back at once, so that UCX finishes it alone: over RDMA it may still be open when the worker goes,
    // and UCX then aborts the process over a request that somebody holds.
    void* closing = ucx_.ucp_ep_close_nbx(endpoint, &param);
    if (UCS_PTR_IS_PTR(closing)) ucx_.ucp_request_free(closing);
    ucx_.ucp_worker_progress(worker_);
}

}  // namespace isthmus
