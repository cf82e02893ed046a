// engine.hpp: one UCX worker and everything that is polled with it: the data plane of one process.
// Invariants: the lock guards UCX and all channels and is never held while waiting for anything else; one
// thread at a time (the driver) calls glance, spin, sleep and take; a forked child may only leak what it
// inherited. Not here: sockets' contents and the handshake (Python), who may drive (turns.hpp), Python
// objects (module.cpp).
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <string_view>
#include <unordered_set>
#include <utility>
#include <vector>

#include "channel.hpp"
#include "frame.hpp"
#include "inbox.hpp"
#include "ucx_library.hpp"

namespace isthmus {

using Bytes = std::span<const std::byte>;

inline constexpr std::uint64_t forever_ns = UINT64_MAX;
std::uint64_t now_ns();

enum class Outcome : std::uint8_t {
    nothing,      // time is up
    message,      // the inbox has a frame
    answer,       // what `await` waits for is here
    lost,         // ... and never will be: its channel is dead
    attention,    // watched descriptors are ready: take_ready()
    woken,        // wake() or a thread that wants to drive
    interrupted,  // a signal came, or it is time to look for one
};

enum class SendStatus : std::uint8_t { sent, full, lost };

struct Ready {
    int descriptor;
    std::uint32_t events;
};

struct NativeFailure {
    std::uint32_t channel_id;
    std::uint64_t call_id;
    std::uint32_t function_id;
    std::int32_t code;
};

// Counted, never logged; read without the lock.
struct Counters {
    std::atomic<std::uint64_t> frames_in{0}, frames_out{0}, frames_dropped{0}, native_calls{0}, spin_ns{0},
        sleeps{0};
};

// What goes out: `data` may be large and is not copied then; `owner` comes back through take_released().
struct Outgoing {
    FrameHeader header;
    Bytes meta;
    std::span<const Bytes> data;
    void* owner = nullptr;
    bool transient = false;  // the bytes do not outlive the call: copy them whatever their size
    bool awaits = false;     // by the driver: the answer goes to answer(), not to the inbox
};

class Engine {
 public:
    // Throws std::runtime_error with UCX's words.
    explicit Engine(const UcxLibrary& ucx);
    ~Engine();
    Engine(const Engine&) = delete;
    Engine& operator=(const Engine&) = delete;

    // False in a forked child.
    bool usable() const;
    void close();
    bool is_closed() const { return worker_ == nullptr; }

    std::vector<std::byte> address();
    // What UCX says about this context, for people.
    std::string describe();
    std::string describe(Channel& channel);

    // Frames for it are accepted from now on. Throws std::invalid_argument when the id is taken or out of
    // range.
    std::shared_ptr<Channel> open(std::uint32_t id, std::uint64_t key);
    // Where its frames go; again, to change one's mind. `recovers`: UCX must survive the peer's death by
    // itself, which rules its shared memory out. Throws std::runtime_error when no transport reaches the
    // peer.
    void attach(Channel& channel, std::uint32_t peer_id, std::uint64_t peer_key, Bytes peer_address,
                bool recovers);
    // Shared memory for large data we send on this channel: a descriptor for the peer, which the caller
    // closes.
    int open_arena(Channel& channel);
    // The peer's. Throws std::system_error when it is not what it should be.
    void map_arena(Channel& channel, int descriptor);
    SendStatus send(Channel& channel, const Outgoing& outgoing);
    // The peer is gone: deliver what had arrived (up to `frames_expected` in all), then a LOST frame, once.
    void lose(Channel& channel, std::string_view reason, std::uint64_t frames_expected);
    // Wait a little for sends under way, then free the endpoint.
    void close(Channel& channel);
    void define(Channel& channel, std::uint32_t function_id, NativeSymbol symbol,
                std::size_t result_bytes_max, const Meter& meter = {});
    bool has_functions() const { return has_functions_.load(std::memory_order_relaxed); }

    // Driving.
    // After a send that awaits its answer, whatever became of it.
    void stop_awaiting();
    Outcome glance(std::uint64_t time_ns);
    // Before one goes with nothing: what is on a descriptor now must not wait for the next time, or a signal
    // that announced it is spent.
    Outcome last_look();
    Outcome spin(std::uint64_t start_ns, std::uint64_t until_ns);
    Outcome sleep(std::uint64_t until_ns);
    Message& answer() { return awaited_.answer; }
    bool take(Message& message);
    // A CALL that came before its function was defined: answer it now. False: it is not for a native
    // function.
    bool answer_late(const Message& message);
    std::vector<Ready> take_ready() { return std::exchange(ready_, {}); }
    std::vector<NativeFailure> take_native_failures();

    // From any thread.
    void wake();
    bool take_wake() { return wake_wanted_.exchange(false, std::memory_order_acquire); }
    // Like wake, but on behalf of a thread that waits for its turn to drive.
    void interrupt();
    std::atomic<std::uint32_t> turns_wanted{0};
    void watch(int descriptor, std::uint32_t events);
    void unwatch(int descriptor);
    bool has_released() const { return has_released_.load(std::memory_order_relaxed); }
    std::vector<void*> take_released();

    Counters counters;
    std::size_t rendezvous_bytes = std::size_t{16} << 10;

 private:
    // One UCX message as its callback sees it.
    struct Incoming {
        Bytes meta;  // what followed the header
        void* payload;
        std::size_t payload_bytes;
        bool rendezvous;
        std::uint64_t offset_bytes;  // of shared data
    };
    struct Awaited {
        bool active = false;
        bool ready = false;
        std::uint32_t channel_id = 0;
        std::uint64_t call_id = 0;
        Message answer;
    };

    static ucs_status_t on_message(void* self, const void* header, std::size_t header_bytes, void* payload,
                                   std::size_t payload_bytes, const ucp_am_recv_param_t* param);
    static void on_received(void* request, ucs_status_t status, std::size_t bytes, void* receiving);
    static void on_sent(void* request, ucs_status_t status, void* sending);
    static void on_failure(void* self, ucp_ep_h endpoint, ucs_status_t status);

    void open_worker();
    void open_descriptors();
    void free_worker();
    void lock_outside();
    void await(const Channel& channel, std::uint64_t call_id);
    Outcome look();
    Outcome progress();
    Outcome spin_rounds();
    void make_room();
    void make_way(unsigned busy_rounds);
    void check_descriptors(int timeout_ms);
    void bury_failed();
    void drain(Channel& channel, std::uint64_t frames_expected);
    void settle_sends(Channel& channel);
    void close_endpoint(Channel& channel);
    void lose_locked(Channel& channel, std::string_view reason, std::uint64_t frames_expected);

    Channel* find(std::uint32_t channel_id);
    ucs_status_t drop();
    ucs_status_t reject(Channel& channel);
    ucs_status_t receive(Channel& channel, const FrameHeader& header, const Incoming& incoming,
                         bool meta_inline);
    ucs_status_t receive_payload(Channel& channel, Arrival& arrival, const Incoming& incoming);
    void received(Receiving* finished, ucs_status_t status);
    static void complete(Arrival& arrival, Buffer payload, std::size_t payload_bytes);
    ucs_status_t receive_shared(Channel& channel, const FrameHeader& header, const Incoming& incoming);
    static bool resolve(const Channel& channel, Arrival& arrival);
    void accept(Channel& channel, const FrameHeader& header, Bytes meta, Bytes data);
    bool is_awaited(const FrameHeader& header) const;
    static bool fill(Message& message, const FrameHeader& header, Bytes meta, Bytes data);
    void deliver_in_turn(Channel& channel);
    void deliver(Channel& channel, Message&& message);
    bool run_native(Channel& channel, const FrameHeader& header, Bytes meta, Bytes data);
    std::int32_t run_metered(NativeFunction& function, Bytes arguments, std::uint64_t& result_bytes) const;
    void fail_native(const NativeFailure& failure);

    SendStatus send_locked(Channel& channel, const Outgoing& outgoing);
    SendStatus submit(Channel& channel, Sending& sending, const Outgoing& outgoing);
    static bool lend(Channel& channel, Sending& sending, const Outgoing& outgoing);
    static std::size_t gather(Sending& sending, const Outgoing& outgoing, bool meta_inline);
    Sending* take_sending();
    void finish(Sending* sending);

    const UcxLibrary& ucx_;
    ucp_context_h context_ = nullptr;
    ucp_worker_h worker_ = nullptr;
    int epoll_fd_ = -1;
    int wake_fd_ = -1;
    int ucx_fd_ = -1;
    std::uint32_t forks_ = 0;
    std::size_t meta_inline_max_ = 0;

    std::mutex lock_;
    std::atomic<std::uint32_t> lock_wanted_{0};
    std::vector<std::shared_ptr<Channel>> channels_;
    Inbox inbox_;
    Awaited awaited_;
    std::vector<std::unique_ptr<Sending>> sendings_;
    Sending* free_sendings_ = nullptr;
    std::unordered_set<Receiving*> receivings_;
    std::vector<void*> released_;
    std::vector<NativeFailure> native_failures_;
    std::atomic<bool> has_released_{false};
    std::atomic<bool> has_failed_{false};
    std::atomic<bool> has_functions_{false};
    std::atomic<bool> has_native_failures_{false};
    std::atomic<bool> wake_wanted_{false};
    std::vector<Ready> ready_;
    std::uint64_t checked_ns_ = 0;
};

}  // namespace isthmus
