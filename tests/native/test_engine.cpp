// Two engines in one process, frames between them: whole, in order, none lost, none from strangers.
// Usage: test_engine /path/to/libucp.so.0
#include <sys/epoll.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <memory>
#include <string_view>
#include <thread>
#include <vector>

#include "check.hpp"
#include "engine.hpp"

using isthmus::Bytes;
using isthmus::Channel;
using isthmus::Engine;
using isthmus::Kind;
using isthmus::Message;
using isthmus::Outcome;
using isthmus::Outgoing;
using isthmus::SendStatus;

namespace {

constexpr std::uint64_t second_ns = 1'000'000'000;
constexpr std::uint64_t key_a = 11;
constexpr std::uint64_t key_b = 22;

Bytes bytes_of(std::string_view text) { return std::as_bytes(std::span(text.data(), text.size())); }
std::string_view text_of(Bytes bytes) { return {reinterpret_cast<const char*>(bytes.data()), bytes.size()}; }

// A channel with both its ends.
struct Pair {
    explicit Pair(const isthmus::UcxLibrary& ucx, bool with_arenas = false) : a(ucx), b(ucx) {
        end_a = a.open(1, key_a);
        end_b = b.open(5, key_b);
        a.attach(*end_a, 5, key_b, b.address(), false);
        b.attach(*end_b, 1, key_a, a.address(), false);
        if (with_arenas) show_arena(a, *end_a, b, *end_b);
    }
    static void show_arena(Engine& from, Channel& from_end, Engine& to, Channel& to_end) {
        const int descriptor = from.open_arena(from_end);
        to.map_arena(to_end, descriptor);
        close(descriptor);
    }
    Engine a, b;
    std::shared_ptr<Channel> end_a, end_b;
};

SendStatus send(Engine& engine, Channel& channel, std::uint64_t call_id, Bytes meta,
                std::vector<Bytes> data = {}, Kind kind = Kind::call, bool awaits = false) {
    Outgoing outgoing{};
    outgoing.awaits = awaits;
    outgoing.header.kind = kind;
    outgoing.header.call_id = call_id;
    outgoing.header.function_id = 3;
    outgoing.meta = meta;
    outgoing.data = data;
    return engine.send(channel, outgoing);
}

Outcome wait(Engine& engine, Engine& other) {
    const std::uint64_t until_ns = isthmus::now_ns() + 10 * second_ns;
    while (isthmus::now_ns() < until_ns) {
        if (const Outcome outcome = engine.glance(isthmus::now_ns()); outcome != Outcome::nothing)
            return outcome;
        other.glance(isthmus::now_ns());  // its side of a rendezvous
    }
    return Outcome::nothing;
}

Message receive(Pair& pair) {
    CHECK(wait(pair.b, pair.a) == Outcome::message);
    Message message;
    CHECK(pair.b.take(message));
    return message;
}

void frames_arrive_whole_and_in_order(const isthmus::UcxLibrary& ucx, bool with_arenas) {
    Pair pair(ucx, with_arenas);
    const std::vector<std::size_t> sizes{0, 1, 4095, 4097, 12 << 10, 100'000, 1 << 20, 3, 40 << 20, 7};
    std::vector<std::vector<std::byte>> sent;
    for (const std::size_t size : sizes) sent.emplace_back(size, static_cast<std::byte>(size % 251 + 1));
    const std::vector<std::byte> long_meta(5'000, std::byte{9});
    for (std::size_t index = 0; index < sizes.size(); ++index) {
        const Bytes whole(sent[index]);
        const Bytes meta = index % 2 == 0 ? bytes_of("meta") : Bytes(long_meta);
        CHECK(send(pair.a, *pair.end_a, index, meta,
                   {whole.first(whole.size() / 3), whole.subspan(whole.size() / 3)}) == SendStatus::sent);
    }
    for (std::size_t index = 0; index < sizes.size(); ++index) {
        const Message message = receive(pair);
        CHECK(message.header.call_id == index && message.header.channel_id == 5 &&
              message.header.function_id == 3);
        CHECK(message.meta().size() == (index % 2 == 0 ? 4 : long_meta.size()));
        CHECK(message.data.size() == sizes[index]);
        CHECK(sizes[index] == 0 || std::memcmp(message.data.data(), sent[index].data(), sizes[index]) == 0);
        CHECK(reinterpret_cast<std::uintptr_t>(message.data.data()) % 64 == 0);
    }
    CHECK(pair.b.counters.frames_dropped == 0);
}

void shared_data_may_come_before_its_arena(const isthmus::UcxLibrary& ucx) {
    Pair pair(ucx);
    const int descriptor = pair.a.open_arena(*pair.end_a);
    const std::vector<std::byte> data(50'000, std::byte{7});
    CHECK(send(pair.a, *pair.end_a, 1, {}, {data}) == SendStatus::sent);
    CHECK(send(pair.a, *pair.end_a, 2, bytes_of("after")) == SendStatus::sent);
    for (int round = 0; round < 100; ++round) CHECK(pair.b.glance(isthmus::now_ns()) == Outcome::nothing);
    pair.b.map_arena(*pair.end_b, descriptor);
    close(descriptor);
    const Message first = receive(pair);
    CHECK(first.header.call_id == 1 && first.data.size() == data.size() && first.header.flags == 0);
    CHECK(receive(pair).header.call_id == 2);
}

void strangers_are_dropped_and_counted(const isthmus::UcxLibrary& ucx) {
    Pair pair(ucx);
    pair.end_a->peer_key = 99;
    CHECK(send(pair.a, *pair.end_a, 1, bytes_of("forged")) == SendStatus::sent);
    pair.end_a->peer_key = key_b;
    pair.end_a->peer_id = 77;
    CHECK(send(pair.a, *pair.end_a, 2, bytes_of("lost")) == SendStatus::sent);
    pair.end_a->peer_id = 5;
    Outgoing unknown{};
    unknown.header.kind = Kind::call;
    unknown.header.flags = isthmus::flags_known + 1;
    CHECK(pair.a.send(*pair.end_a, unknown) == SendStatus::sent);
    pair.end_a->sequence_out = 0;
    CHECK(send(pair.a, *pair.end_a, 3, bytes_of("mine")) == SendStatus::sent);
    CHECK(receive(pair).header.call_id == 3);
    CHECK(pair.b.counters.frames_dropped == 3);
}

void a_full_channel_refuses_and_loses_nothing(const isthmus::UcxLibrary& ucx) {
    Pair pair(ucx);
    std::uint64_t sent = 0;
    while (send(pair.a, *pair.end_a, sent, bytes_of("x")) == SendStatus::sent) CHECK(++sent < 100'000);
    for (std::uint64_t expected = 0; expected < sent; ++expected)
        CHECK(receive(pair).header.call_id == expected);
}

void an_answer_is_kept_apart(const isthmus::UcxLibrary& ucx) {
    Pair pair(ucx);
    CHECK(send(pair.b, *pair.end_b, 2, {}, {}, Kind::call, true) == SendStatus::sent);
    CHECK(send(pair.a, *pair.end_a, 1, bytes_of("other"), {}, Kind::result) == SendStatus::sent);
    CHECK(send(pair.a, *pair.end_a, 2, bytes_of("mine"), {}, Kind::result) == SendStatus::sent);
    CHECK(wait(pair.b, pair.a) == Outcome::answer && text_of(pair.b.answer().meta()) == "mine");
    pair.b.stop_awaiting();
    CHECK(receive(pair).header.call_id == 1);
}

std::int32_t reverse(const void* arguments, std::uint64_t arguments_bytes, void* result,
                     std::uint64_t* result_bytes) {
    if (arguments_bytes > *result_bytes) return 7;
    for (std::uint64_t index = 0; index < arguments_bytes; ++index)
        static_cast<char*>(result)[index] = static_cast<const char*>(arguments)[arguments_bytes - 1 - index];
    *result_bytes = arguments_bytes;
    return 0;
}

void native_functions_are_metered(const isthmus::UcxLibrary& ucx) {
    Pair pair(ucx, true);
    isthmus::Meter::Row row{};
    std::uint64_t running = 0;
    pair.b.define(*pair.end_b, 3, reverse, 8, {.row = &row, .running = &running});
    constexpr std::uint64_t calls = 40;
    for (std::uint64_t call = 1; call <= calls; ++call) {
        running = call % 2;  // 1: other code runs around the progress that serves the call
        CHECK(send(pair.a, *pair.end_a, call, bytes_of(call == calls ? "too long for it" : "short")) ==
              SendStatus::sent);
        CHECK(wait(call == calls ? pair.b : pair.a, call == calls ? pair.a : pair.b) != Outcome::nothing);
        Message answer;
        if (call < calls) CHECK(pair.a.take(answer));
        CHECK(running == call % 2);
    }
    CHECK(row.calls == calls && row.errors == 1);
    CHECK(row.busy_ns > 0 && row.last_ns != 0 && row.last_ns <= isthmus::now_ns());
}

void native_functions_answer_by_themselves(const isthmus::UcxLibrary& ucx) {
    Pair pair(ucx, true);
    CHECK(send(pair.a, *pair.end_a, 1, bytes_of("early")) == SendStatus::sent);
    const Message early = receive(pair);
    pair.b.define(*pair.end_b, 3, reverse, 20'000);
    CHECK(pair.b.answer_late(early));
    CHECK(send(pair.a, *pair.end_a, 2, bytes_of("abc")) == SendStatus::sent);
    const std::vector<std::byte> data(15'000, std::byte{4});
    CHECK(send(pair.a, *pair.end_a, 3, {}, {data}) == SendStatus::sent);
    const std::vector<std::string_view> expected{"ylrae", "cba"};
    for (std::uint64_t call = 1; call <= 3; ++call) {
        CHECK(wait(pair.a, pair.b) == Outcome::message);
        Message answer;
        CHECK(pair.a.take(answer) && answer.header.kind == Kind::result && answer.header.call_id == call);
        if (call < 3) CHECK(text_of(answer.meta()) == expected[call - 1]);
        if (call == 3) CHECK(answer.meta().size() == data.size() && answer.meta()[14'999] == std::byte{4});
    }
    const std::vector<std::byte> too_long(20'001);
    CHECK(send(pair.a, *pair.end_a, 4, {}, {too_long}) == SendStatus::sent);
    CHECK(wait(pair.b, pair.a) == Outcome::attention);
    const std::vector<isthmus::NativeFailure> failures = pair.b.take_native_failures();
    CHECK(failures.size() == 1 && failures[0].call_id == 4 && failures[0].code == 7);
}

void a_lost_channel_says_so_once_and_last(const isthmus::UcxLibrary& ucx) {
    Pair pair(ucx);
    CHECK(send(pair.a, *pair.end_a, 1, bytes_of("last words")) == SendStatus::sent);
    pair.b.lose(*pair.end_b, "the peer is gone", 0);
    pair.b.lose(*pair.end_b, "the peer is gone", 0);
    CHECK(receive(pair).header.call_id == 1);
    const Message lost = receive(pair);
    CHECK(lost.header.kind == Kind::lost && lost.header.channel_id == 5 &&
          text_of(lost.meta()) == "the peer is gone");
    CHECK(pair.b.glance(isthmus::now_ns()) == Outcome::nothing);
    CHECK(send(pair.b, *pair.end_b, 1, {}, {}, Kind::call, true) == SendStatus::lost);
    CHECK(pair.b.glance(isthmus::now_ns()) == Outcome::lost);
    pair.b.stop_awaiting();
    pair.b.close(*pair.end_b);
}

void owners_come_back_when_the_data_has_left(const isthmus::UcxLibrary& ucx) {
    Pair pair(ucx);
    std::vector<std::byte> data(100'000);
    int owner = 0;
    Outgoing outgoing{};
    outgoing.header.kind = Kind::call;
    const Bytes piece(data);
    outgoing.data = {&piece, 1};
    outgoing.owner = &owner;
    CHECK(pair.a.send(*pair.end_a, outgoing) == SendStatus::sent);
    CHECK(receive(pair).data.size() == data.size());
    while (!pair.a.has_released()) pair.a.glance(isthmus::now_ns());
    const std::vector<void*> released = pair.a.take_released();
    CHECK(released.size() == 1 && released[0] == &owner);
}

void a_sleeper_wakes_for_frames_descriptors_and_wakes(const isthmus::UcxLibrary& ucx) {
    Pair pair(ucx);
    CHECK(pair.b.sleep(isthmus::now_ns() + 10'000'000) == Outcome::nothing);
    std::thread waker([&] { pair.b.wake(); });
    CHECK(pair.b.sleep(isthmus::forever_ns) == Outcome::woken && pair.b.take_wake());
    waker.join();
    int pipe_ends[2];
    CHECK(pipe(pipe_ends) == 0);
    pair.b.watch(pipe_ends[0], EPOLLIN);
    CHECK(write(pipe_ends[1], "x", 1) == 1 && pair.b.sleep(isthmus::forever_ns) == Outcome::attention);
    const std::vector<isthmus::Ready> ready = pair.b.take_ready();
    CHECK(ready.size() == 1 && ready[0].descriptor == pipe_ends[0]);
    pair.b.unwatch(pipe_ends[0]);
    std::thread sender([&] { CHECK(send(pair.a, *pair.end_a, 1, bytes_of("x")) == SendStatus::sent); });
    CHECK(pair.b.sleep(isthmus::now_ns() + 10 * second_ns) == Outcome::message);
    sender.join();
    close(pipe_ends[0]);
    close(pipe_ends[1]);
}

// What TSan is for: threads that send while another drives.
void threads_may_send_while_another_drives(const isthmus::UcxLibrary& ucx) {
    constexpr std::uint64_t each = 300;
    Pair pair(ucx, true);
    std::atomic<bool> done{false};
    std::thread driver([&] {  // of the sending engine: lets what is queued leave
        while (!done) pair.a.spin(isthmus::now_ns(), isthmus::now_ns() + 100'000);
    });
    std::vector<std::thread> senders;
    const std::vector<std::byte> data(20'000, std::byte{5});
    for (std::uint64_t first = 0; first < 3; ++first)
        senders.emplace_back([&, first] {
            for (std::uint64_t call = first * each; call < (first + 1) * each; ++call)
                while (send(pair.a, *pair.end_a, call, bytes_of("x"), {data}) != SendStatus::sent)
                    std::this_thread::yield();
            while (pair.end_a->has_unsent()) std::this_thread::yield();  // ... and others see to it
        });
    std::vector<bool> seen(3 * each);
    for (std::size_t count = 0; count < seen.size(); ++count) {
        Outcome outcome = Outcome::nothing;
        while (outcome != Outcome::message) {
            outcome = pair.b.glance(isthmus::now_ns());
            if (outcome == Outcome::nothing) outcome = pair.b.sleep(isthmus::now_ns() + second_ns / 100);
        }
        Message message;
        CHECK(pair.b.take(message) && message.data.size() == data.size() && !seen[message.header.call_id]);
        seen[message.header.call_id] = true;
    }
    for (std::thread& sender : senders) sender.join();
    done = true;
    driver.join();
}

}  // namespace

int main(int count, char** arguments) {
    CHECK(count == 2);
    const isthmus::UcxLibrary ucx = isthmus::UcxLibrary::load(arguments[1]);
    frames_arrive_whole_and_in_order(ucx, false);
    frames_arrive_whole_and_in_order(ucx, true);
    shared_data_may_come_before_its_arena(ucx);
    strangers_are_dropped_and_counted(ucx);
    a_full_channel_refuses_and_loses_nothing(ucx);
    an_answer_is_kept_apart(ucx);
    native_functions_answer_by_themselves(ucx);
    native_functions_are_metered(ucx);
    a_lost_channel_says_so_once_and_last(ucx);
    owners_come_back_when_the_data_has_left(ucx);
    a_sleeper_wakes_for_frames_descriptors_and_wakes(ucx);
    threads_may_send_while_another_drives(ucx);
}
