// messages.cpp: the hot half of the engine, frames out and frames in. Nothing here throws, and once buffers
// and slots exist, small frames allocate nothing.
#include <algorithm>
#include <array>
#include <cstring>
#include <new>
#include <optional>
#include <utility>

#include "engine.hpp"

namespace isthmus {
namespace {

constexpr std::size_t near_rendezvous_bytes = std::size_t{32} << 20;
constexpr std::size_t copy_bytes_max =
    4096;  // data up to here is copied, so that the caller may reuse it at once
constexpr std::uint32_t sends_outstanding_max = 256;  // per channel; beyond it send() says full
constexpr std::uint32_t replies_outstanding_max =
    4 * sends_outstanding_max;  // native answers must not be dropped

constexpr std::uint64_t native_brief_ns = 2'000;  // shorter native calls are not all timed
constexpr unsigned native_untimed = 15;

constexpr std::size_t arrivals_max = 65536;  // frames ahead of their turn; only a peer that cheats has more

constexpr std::size_t aligned(std::size_t bytes) {
    return (bytes + Pool::alignment_bytes - 1) / Pool::alignment_bytes * Pool::alignment_bytes;
}

std::size_t total_bytes(std::span<const Bytes> pieces) {
    std::size_t total = 0;
    for (const Bytes piece : pieces) total += piece.size();
    return total;
}

// Where data begins in a payload that also carries meta: both aligned in the receiver's buffer.
std::size_t data_offset(const FrameHeader& header) {
    return header.data_bytes == 0 ? header.meta_bytes : aligned(header.meta_bytes);
}

constexpr std::array<std::byte, Pool::alignment_bytes> padding{};

}  // namespace

// out
// -------------------------------------------------------------------------------------------------------------
SendStatus Engine::send(Channel& channel, const Outgoing& outgoing) {
    lock_outside();
    const std::lock_guard guard(lock_, std::adopt_lock);
    if (outgoing.awaits) await(channel, outgoing.header.call_id);
    if (channel.alive && channel.sends_outstanding >= sends_outstanding_max) return SendStatus::full;
    return send_locked(channel, outgoing);
}

SendStatus Engine::send_locked(Channel& channel, const Outgoing& outgoing) {
    if (!channel.alive.load(std::memory_order_relaxed) || channel.endpoint == nullptr)
        return SendStatus::lost;
    Sending* sending = take_sending();
    if (sending == nullptr) return SendStatus::full;
    FrameHeader& header = sending->header;
    header = outgoing.header;
    header.channel_id = channel.peer_id;
    header.channel_key = channel.peer_key;
    header.meta_bytes = outgoing.meta.size();
    header.data_bytes = total_bytes(outgoing.data);
    header.sequence = channel.sequence_out;
    sending->channel_id = channel.id;
    const SendStatus status = submit(channel, *sending, outgoing);
    if (status == SendStatus::sent) {
        ++channel.sequence_out;
        counters.frames_out.fetch_add(1, std::memory_order_relaxed);
    }
    return status;
}

SendStatus Engine::submit(Channel& channel, Sending& sending, const Outgoing& outgoing) {
    const FrameHeader& header = sending.header;
    const bool meta_inline = header.meta_bytes <= meta_inline_max_;
    const bool shared = meta_inline && channel.arena != nullptr && lend(channel, sending, outgoing);
    if (meta_inline && header.meta_bytes != 0)
        std::memcpy(sending.meta.data(), outgoing.meta.data(), outgoing.meta.size());
    const std::size_t payload_bytes =
        shared ? 0 : (meta_inline ? 0 : data_offset(header)) + header.data_bytes;
    const void* payload = nullptr;
    std::size_t count = payload_bytes;
    ucp_request_param_t param{};
    param.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS | UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA;
    param.flags = payload_bytes >= (channel.recovers ? rendezvous_bytes : near_rendezvous_bytes)
                      ? UCP_AM_SEND_FLAG_RNDV
                      : UCP_AM_SEND_FLAG_EAGER;
    param.cb.send = on_sent;
    param.user_data = &sending;

    if (payload_bytes != 0 && (payload_bytes <= copy_bytes_max || outgoing.transient)) {
        sending.copy = Buffer::of(payload_bytes);
        if (!sending.copy) return finish(&sending), SendStatus::full;
        std::byte* target = sending.copy.data();
        if (!meta_inline) {
            std::memcpy(target, outgoing.meta.data(), outgoing.meta.size());
            target += data_offset(header);
        }
        for (const Bytes piece : outgoing.data) {
            if (!piece.empty()) std::memcpy(target, piece.data(), piece.size());
            target += piece.size();
        }
        payload = sending.copy.data();
    } else if (payload_bytes != 0 && meta_inline && outgoing.data.size() == 1) {
        payload = outgoing.data[0].data();
    } else if (payload_bytes != 0) {
        count = gather(sending, outgoing, meta_inline);
        payload = sending.more_pieces.empty() ? sending.pieces.data() : sending.more_pieces.data();
        param.op_attr_mask |= UCP_OP_ATTR_FIELD_DATATYPE;
        param.datatype = UCP_DATATYPE_IOV;
    }

    const std::size_t header_bytes =
        sizeof(FrameHeader) + (meta_inline ? header.meta_bytes : 0) + (shared ? sizeof(std::uint64_t) : 0);
    sending.owner = outgoing.owner;
    channel.count_sending();
    void* request = ucx_.ucp_am_send_nbx(channel.endpoint, message_id, &sending.header, header_bytes, payload,
                                         count, &param);
    if (UCS_PTR_IS_PTR(request)) return SendStatus::sent;
    channel.count_sent();
    if (UCS_PTR_IS_ERR(request)) sending.owner = nullptr;  // stays the caller's
    finish(&sending);
    if (!UCS_PTR_IS_ERR(request)) return SendStatus::sent;
    if (UCS_PTR_STATUS(request) == UCS_ERR_NO_MEMORY || UCS_PTR_STATUS(request) == UCS_ERR_NO_RESOURCE)
        return SendStatus::full;
    channel.lost_because = ucx_.ucs_status_string(UCS_PTR_STATUS(request));
    channel.failed = true;
    has_failed_ = true;
    return SendStatus::lost;
}

// Copy the data into the arena; its offset follows the meta.
bool Engine::lend(Channel& channel, Sending& sending, const Outgoing& outgoing) {
    if (sending.header.data_bytes < Arena::data_bytes_min) return false;
    const std::optional<std::uint64_t> offset = channel.arena->take(sending.header.data_bytes);
    if (!offset) return false;
    std::byte* target = channel.arena->at(*offset);
    for (const Bytes piece : outgoing.data) {
        std::memcpy(target, piece.data(), piece.size());
        target += piece.size();
    }
    std::memcpy(sending.meta.data() + outgoing.meta.size(), &*offset, sizeof *offset);
    sending.header.flags |= flag_shared;
    return true;
}

// Describe meta, padding and data to UCX piece by piece; returns how many pieces.
std::size_t Engine::gather(Sending& sending, const Outgoing& outgoing, bool meta_inline) {
    const std::size_t count = outgoing.data.size() + (meta_inline ? 0 : 2);
    ucp_dt_iov_t* piece = sending.pieces.data();
    if (count > sending.pieces.size()) {
        sending.more_pieces.resize(count);
        piece = sending.more_pieces.data();
    }
    if (!meta_inline) {
        const std::size_t pad_bytes = data_offset(sending.header) - sending.header.meta_bytes;
        *piece++ = {const_cast<std::byte*>(outgoing.meta.data()), outgoing.meta.size()};
        *piece++ = {const_cast<std::byte*>(padding.data()), pad_bytes};
    }
    for (const Bytes bytes : outgoing.data) *piece++ = {const_cast<std::byte*>(bytes.data()), bytes.size()};
    return count;
}

Sending* Engine::take_sending() {
    if (free_sendings_ == nullptr) {
        auto* fresh = new (std::nothrow) Sending;
        if (fresh == nullptr) return nullptr;
        fresh->engine = this;
        sendings_.emplace_back(fresh);
        return fresh;
    }
    return std::exchange(free_sendings_, free_sendings_->next);
}

void Engine::finish(Sending* sending) {
    if (void* owner = std::exchange(sending->owner, nullptr)) {
        released_.push_back(owner);
        has_released_.store(true, std::memory_order_relaxed);
    }
    sending->copy.reset();
    sending->more_pieces.clear();
    sending->next = std::exchange(free_sendings_, sending);
}

void Engine::on_sent(void* request, ucs_status_t /*status: a failure also comes through on_failure*/,
                     void* sent) {
    auto* sending = static_cast<Sending*>(sent);
    Engine& engine = *sending->engine;
    if (Channel* channel = engine.find(sending->channel_id)) channel->count_sent();
    engine.finish(sending);
    engine.ucx_.ucp_request_free(request);
}

// in
// --------------------------------------------------------------------------------------------------------------
ucs_status_t Engine::on_message(void* self, const void* header, std::size_t header_bytes, void* payload,
                                std::size_t payload_bytes, const ucp_am_recv_param_t* param) {
    auto& engine = *static_cast<Engine*>(self);
    FrameHeader frame;
    if (header_bytes < sizeof frame) return engine.drop();
    std::memcpy(&frame, header, sizeof frame);
    Channel* channel = engine.find(frame.channel_id);
    if (!valid(frame) || channel == nullptr || channel->key != frame.channel_key || !channel->alive ||
        frame.sequence < channel->sequence_in)
        return engine.drop();
    const bool shared = (frame.flags & flag_shared) != 0;
    std::uint64_t offset_bytes = 0;
    if (header_bytes < sizeof frame + (shared ? sizeof offset_bytes : 0)) return engine.reject(*channel);
    const std::size_t inline_bytes = header_bytes - sizeof frame - (shared ? sizeof offset_bytes : 0);
    const auto* behind_header = static_cast<const std::byte*>(header) + sizeof frame;
    if (shared) std::memcpy(&offset_bytes, behind_header + inline_bytes, sizeof offset_bytes);
    const Incoming incoming{
        .meta = {behind_header, inline_bytes},
        .payload = payload,
        .payload_bytes = payload_bytes,
        .rendezvous = (param->recv_attr & UCP_AM_RECV_ATTR_FLAG_RNDV) != 0,
        .offset_bytes = offset_bytes,
    };
    const bool meta_inline = inline_bytes == frame.meta_bytes;
    const std::size_t expected_bytes = shared ? 0 : (meta_inline ? 0 : data_offset(frame)) + frame.data_bytes;
    if ((!meta_inline && inline_bytes != 0) || payload_bytes != expected_bytes)
        return engine.reject(*channel);
    if (shared && !meta_inline) return engine.reject(*channel);
    frame.channel_id = channel->id;
    if (shared) return engine.receive_shared(*channel, frame, incoming);
    return engine.receive(*channel, frame, incoming, meta_inline);
}

ucs_status_t Engine::drop() {
    counters.frames_dropped.fetch_add(1, std::memory_order_relaxed);
    return UCS_OK;
}

// A frame with the right key that breaks the format: the peer is not what it says, and its order is lost.
ucs_status_t Engine::reject(Channel& channel) {
    channel.lost_because = "the peer sent a malformed frame";
    channel.failed = true;
    has_failed_ = true;
    return drop();
}

ucs_status_t Engine::receive(Channel& channel, const FrameHeader& header, const Incoming& incoming,
                             bool meta_inline) {
    counters.frames_in.fetch_add(1, std::memory_order_relaxed);
    if (header.sequence == channel.sequence_in && !incoming.rendezvous) {
        const Bytes payload(static_cast<const std::byte*>(incoming.payload), incoming.payload_bytes);
        const Bytes meta = meta_inline ? incoming.meta : payload.first(header.meta_bytes);
        ++channel.sequence_in;
        accept(channel, header, meta, payload.last(header.data_bytes));
        if (!channel.arrivals.empty()) deliver_in_turn(channel);
        return UCS_OK;
    }
    auto [position, is_new] = channel.arrivals.try_emplace(header.sequence);
    if (!is_new || channel.arrivals.size() > arrivals_max) return reject(channel);
    position->second = std::make_unique<Arrival>();
    Message& message = position->second->message;
    message.header = header;
    if (meta_inline && !message.set_meta(incoming.meta)) return reject(channel);
    return receive_payload(channel, *position->second, incoming);
}

ucs_status_t Engine::receive_shared(Channel& channel, const FrameHeader& header, const Incoming& incoming) {
    counters.frames_in.fetch_add(1, std::memory_order_relaxed);
    auto [position, is_new] = channel.arrivals.try_emplace(header.sequence);
    if (!is_new || channel.arrivals.size() > arrivals_max) return reject(channel);
    position->second = std::make_unique<Arrival>();
    Arrival& arrival = *position->second;
    arrival.message.header = header;
    arrival.message.header.flags &= static_cast<std::uint8_t>(~flag_shared);
    arrival.is_shared = true;
    arrival.offset_bytes = incoming.offset_bytes;
    if (!arrival.message.set_meta(incoming.meta)) return reject(channel);
    if (channel.arena_in == nullptr) return UCS_OK;  // its descriptor is still on its way
    if (!resolve(channel, arrival)) return reject(channel);
    deliver_in_turn(channel);
    return UCS_OK;
}

bool Engine::resolve(const Channel& channel, Arrival& arrival) {
    const std::uint64_t offset = arrival.offset_bytes;
    const std::uint64_t bytes = arrival.message.header.data_bytes;
    const std::uint64_t file_bytes = channel.arena_in->bytes();
    if (offset % sizeof(Lease) != 0 || offset < sizeof(Lease) || offset > file_bytes ||
        bytes > file_bytes - offset)
        return false;
    arrival.message.data = Buffer(channel.arena_in, offset, bytes);
    arrival.complete = true;
    return true;
}

void Engine::map_arena(Channel& channel, int descriptor) {
    auto mapping = std::make_shared<Mapping>(descriptor, Arena::file_bytes);
    lock_outside();
    const std::lock_guard guard(lock_, std::adopt_lock);
    channel.arena_in = std::move(mapping);
    for (auto& [sequence, arrival] : channel.arrivals)
        if (arrival->is_shared && !resolve(channel, *arrival)) return static_cast<void>(reject(channel));
    deliver_in_turn(channel);
}

// The frame whose turn it is, straight from UCX's buffers to its place.
void Engine::accept(Channel& channel, const FrameHeader& header, Bytes meta, Bytes data) {
    if (header.kind == Kind::call && run_native(channel, header, meta, data)) return;
    const bool awaited = is_awaited(header);
    if (!awaited && inbox_.full()) return static_cast<void>(reject(channel));
    Message& message = awaited ? awaited_.answer : inbox_.push();
    if (fill(message, header, meta, data)) {
        awaited_.ready |= awaited;
        return;
    }
    if (!awaited) inbox_.drop_last();
    reject(channel);
}

bool Engine::is_awaited(const FrameHeader& header) const {
    return awaited_.active && !awaited_.ready && header.call_id == awaited_.call_id &&
           header.channel_id == awaited_.channel_id && answers(header.kind);
}

bool Engine::fill(Message& message, const FrameHeader& header, Bytes meta, Bytes data) {
    message.header = header;
    if (!message.set_meta(meta)) return false;
    if (data.empty()) return true;
    message.data = Buffer::of(data.size());
    if (!message.data) return false;
    std::memcpy(message.data.data(), data.data(), data.size());
    return true;
}

// Out of turn, or by rendezvous: into a buffer of its own.
ucs_status_t Engine::receive_payload(Channel& channel, Arrival& arrival, const Incoming& incoming) {
    Buffer payload = Buffer::of(std::max<std::size_t>(incoming.payload_bytes, 1));
    if (!payload) return reject(channel);
    if (!incoming.rendezvous) {
        if (incoming.payload_bytes != 0)
            std::memcpy(payload.data(), incoming.payload, incoming.payload_bytes);
        complete(arrival, std::move(payload), incoming.payload_bytes);
        return UCS_OK;
    }
    auto* receiving =
        new (std::nothrow) Receiving{this, channel.id, arrival.message.header.sequence, std::move(payload)};
    if (receiving == nullptr) return reject(channel);
    receivings_.insert(receiving);
    ucp_request_param_t param{};
    param.op_attr_mask =
        UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_MEMORY_TYPE;
    param.cb.recv_am = on_received;
    param.user_data = receiving;
    param.memory_type = UCS_MEMORY_TYPE_HOST;
    void* request = ucx_.ucp_am_recv_data_nbx(worker_, incoming.payload, receiving->payload.data(),
                                              incoming.payload_bytes, &param);
    if (!UCS_PTR_IS_PTR(request)) received(receiving, UCS_PTR_STATUS(request));
    return UCS_INPROGRESS;
}

void Engine::on_received(void* request, ucs_status_t status, std::size_t /*bytes*/, void* received) {
    auto* receiving = static_cast<Receiving*>(received);
    Engine& engine = *receiving->engine;
    engine.received(receiving, status);
    engine.ucx_.ucp_request_free(request);
}

void Engine::received(Receiving* finished, ucs_status_t status) {
    const std::unique_ptr<Receiving> receiving(finished);
    receivings_.erase(finished);
    Channel* channel = find(receiving->channel_id);
    if (channel == nullptr) return;
    const auto position = channel->arrivals.find(receiving->sequence);
    if (position == channel->arrivals.end()) return;
    if (status != UCS_OK) {
        channel->lost_because = ucx_.ucs_status_string(status);
        channel->failed = true;
        has_failed_ = true;
        return;
    }
    complete(*position->second, std::move(receiving->payload), receiving->payload.size());
    deliver_in_turn(*channel);
}

void Engine::complete(Arrival& arrival, Buffer payload, std::size_t payload_bytes) {
    Message& message = arrival.message;
    const FrameHeader header = message.header;
    if (payload_bytes != header.data_bytes) {  // meta came with the payload
        message.set_meta({payload.data(), header.meta_bytes});
        payload.skip(data_offset(header));
    }
    if (header.data_bytes != 0) message.data = std::move(payload);
    arrival.complete = true;
}

void Engine::deliver_in_turn(Channel& channel) {
    while (!channel.arrivals.empty()) {
        const auto next = channel.arrivals.begin();
        if (next->first != channel.sequence_in || !next->second->complete) return;
        const std::unique_ptr<Arrival> arrival = std::move(next->second);
        channel.arrivals.erase(next);
        ++channel.sequence_in;
        deliver(channel, std::move(arrival->message));
    }
}

void Engine::deliver(Channel& channel, Message&& message) {
    const FrameHeader& header = message.header;
    if (header.kind == Kind::call && run_native(channel, header, message.meta(), message.data.span())) return;
    if (is_awaited(header)) {
        awaited_.answer = std::move(message);
        awaited_.ready = true;
    } else {
        inbox_.push() = std::move(message);
    }
}

// native functions
// ------------------------------------------------------------------------------------------------
bool Engine::run_native(Channel& channel, const FrameHeader& header, Bytes meta, Bytes data) {
    const auto function =
        std::ranges::find(channel.functions, header.function_id, &NativeFunction::function_id);
    if (function == channel.functions.end()) return false;
    const Bytes arguments = data.empty() ? meta : data;
    std::uint64_t result_bytes = function->result.size();
    const std::int32_t code = run_metered(*function, arguments, result_bytes);
    counters.native_calls.fetch_add(1, std::memory_order_relaxed);
    const bool no_reply = (header.flags & flag_no_reply) != 0;
    if (code != 0 || result_bytes > function->result.size()) {
        if (!no_reply) fail_native({channel.id, header.call_id, header.function_id, code});
        return true;
    }
    if (no_reply || channel.sends_outstanding >= replies_outstanding_max) return true;
    Outgoing reply{};
    reply.header.kind = Kind::result;
    reply.header.call_id = header.call_id;
    reply.header.function_id = header.function_id;
    reply.meta = {function->result.data(), result_bytes};
    reply.transient = true;
    send_locked(channel, reply);
    return true;
}

// Reading the clock twice costs as much as a short function: of those only some calls are timed.
std::int32_t Engine::run_metered(NativeFunction& function, Bytes arguments,
                                 std::uint64_t& result_bytes) const {
    const Meter& meter = function.meter;
    const bool timed = function.untimed == 0 || function.usual_ns > native_brief_ns;
    const std::uint64_t start_ns = timed ? now_ns() : checked_ns_;
    const std::uint64_t outer = meter.running != nullptr ? std::exchange(*meter.running, 1) : 0;
    const std::int32_t code =
        function.symbol(arguments.data(), arguments.size(), function.result.data(), &result_bytes);
    if (meter.running != nullptr) *meter.running = outer;  // other code may run around this progress
    if (timed) function.usual_ns = now_ns() - start_ns;
    function.untimed = timed ? native_untimed : function.untimed - 1;
    if (meter.row == nullptr) return code;
    meter.row->calls += 1;
    meter.row->errors += code != 0 || result_bytes > function.result.size() ? 1 : 0;
    meter.row->busy_ns += function.usual_ns;
    meter.row->last_ns = std::max(meter.row->last_ns, start_ns + function.usual_ns);
    return code;
}

bool Engine::answer_late(const Message& message) {
    const std::lock_guard guard(lock_);
    Channel* channel = find(message.header.channel_id);
    return channel != nullptr && message.header.kind == Kind::call &&
           run_native(*channel, message.header, message.meta(), message.data.span());
}

void Engine::fail_native(const NativeFailure& failure) {
    native_failures_.push_back(failure);
    has_native_failures_ = true;
}

}  // namespace isthmus
