// floors.cpp: the least that the data plane can cost here, as one line of JSON. Two processes, pinned to two
// cores: a raw UCX active message there and back (1 B; 1 MiB), a blocking Unix-socket ping-pong, and a memcpy
// of 1 MiB. Usage: floors /path/to/libucp.so.0
#include <sched.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "ucx_library.hpp"

namespace {

constexpr std::size_t large_bytes = std::size_t{1} << 20;
constexpr int small_rounds = 100'000;
constexpr int large_rounds = 1'000;

void require(bool good, const char* what) {
    if (good) return;
    std::fprintf(stderr, "floors: %s failed\n", what);
    std::exit(1);
}

void pin(int core) {
    cpu_set_t cores;
    CPU_ZERO(&cores);
    CPU_SET(core, &cores);
    sched_setaffinity(0, sizeof cores, &cores);
}

double median_us(int rounds, const std::function<void()>& act) {
    std::vector<double> samples;
    for (int round = 0; round < rounds; ++round) {
        const auto start = std::chrono::steady_clock::now();
        act();
        samples.push_back(
            std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start).count());
    }
    std::ranges::nth_element(samples, samples.begin() + rounds / 2);
    return samples[static_cast<std::size_t>(rounds) / 2];
}

void transfer(int socket, bool out, void* data, std::size_t bytes) {
    const ssize_t count = out ? send(socket, data, bytes, 0) : recv(socket, data, bytes, MSG_WAITALL);
    require(count == static_cast<ssize_t>(bytes), "socket");
}

// One side of a UCX ping-pong.
class Side {
 public:
    Side(const isthmus::UcxLibrary& ucx, int socket) : ucx_(ucx) {
        ucp_config_t* config = nullptr;
        require(ucx.ucp_config_read(nullptr, nullptr, &config) == UCS_OK, "UCX settings");
        ucp_params_t params{};
        params.field_mask = UCP_PARAM_FIELD_FEATURES;
        params.features = UCP_FEATURE_AM;
        require(ucx.ucp_init_version(1, 13, &params, config, &context_) == UCS_OK, "UCX context");
        ucx.ucp_config_release(config);
        const ucp_worker_params_t worker_params{};
        require(ucx.ucp_worker_create(context_, &worker_params, &worker_) == UCS_OK, "UCX worker");
        ucp_am_handler_param_t handler{};
        handler.field_mask =
            UCP_AM_HANDLER_PARAM_FIELD_ID | UCP_AM_HANDLER_PARAM_FIELD_CB | UCP_AM_HANDLER_PARAM_FIELD_ARG;
        handler.cb = on_message;
        handler.arg = this;
        require(ucx.ucp_worker_set_am_recv_handler(worker_, &handler) == UCS_OK, "UCX handler");
        connect(socket);
    }
    void send(std::size_t bytes) {
        ucp_request_param_t param{};
        param.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS;
        param.flags = UCP_AM_SEND_FLAG_EAGER;
        void* request = ucx_.ucp_am_send_nbx(endpoint_, 0, nullptr, 0, outgoing_.data(), bytes, &param);
        require(!UCS_PTR_IS_ERR(request), "UCX send");
        if (request == nullptr) return;
        while (ucx_.ucp_request_check_status(request) == UCS_INPROGRESS) ucx_.ucp_worker_progress(worker_);
        ucx_.ucp_request_free(request);
    }
    void receive() {
        while (arrived_ == taken_) ucx_.ucp_worker_progress(worker_);
        ++taken_;
    }

 private:
    void connect(int socket) {
        ucp_address_t* own = nullptr;
        std::size_t own_bytes = 0;
        std::size_t peer_bytes = 0;
        require(ucx_.ucp_worker_get_address(worker_, &own, &own_bytes) == UCS_OK, "UCX address");
        transfer(socket, true, &own_bytes, sizeof own_bytes);
        transfer(socket, true, own, own_bytes);
        transfer(socket, false, &peer_bytes, sizeof peer_bytes);
        std::vector<char> peer(peer_bytes);
        transfer(socket, false, peer.data(), peer_bytes);
        ucp_ep_params_t params{};
        params.field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS;
        params.address = reinterpret_cast<const ucp_address_t*>(peer.data());
        require(ucx_.ucp_ep_create(worker_, &params, &endpoint_) == UCS_OK, "UCX endpoint");
    }
    static ucs_status_t on_message(void* self, const void* /*header*/, std::size_t /*header_bytes*/,
                                   void* data, std::size_t bytes, const ucp_am_recv_param_t* /*param*/) {
        auto& side = *static_cast<Side*>(self);
        std::memcpy(side.incoming_.data(), data, bytes);
        ++side.arrived_;
        return UCS_OK;
    }

    const isthmus::UcxLibrary& ucx_;
    ucp_context_h context_ = nullptr;
    ucp_worker_h worker_ = nullptr;
    ucp_ep_h endpoint_ = nullptr;
    std::vector<char> outgoing_ = std::vector<char>(large_bytes, 'x');
    std::vector<char> incoming_ = std::vector<char>(large_bytes);
    std::uint64_t arrived_ = 0;
    std::uint64_t taken_ = 0;
};

void echo(const isthmus::UcxLibrary& ucx, int socket) {
    char byte = 0;
    for (int round = 0; round < small_rounds; ++round) {
        transfer(socket, false, &byte, 1);
        transfer(socket, true, &byte, 1);
    }
    Side side(ucx, socket);
    for (int round = 0; round < small_rounds + large_rounds; ++round) {
        side.receive();
        side.send(round < small_rounds ? 1 : large_bytes);
    }
    transfer(socket, false, &byte, 1);  // leave only when the other side has everything
}

void measure(const isthmus::UcxLibrary& ucx, int socket) {
    char byte = 'x';
    const double socket_us = median_us(small_rounds, [&] {
        transfer(socket, true, &byte, 1);
        transfer(socket, false, &byte, 1);
    });
    Side side(ucx, socket);
    const auto round_trip = [&](std::size_t bytes) {
        side.send(bytes);
        side.receive();
    };
    const double small_us = median_us(small_rounds, [&] { round_trip(1); });
    const double large_us = median_us(large_rounds, [&] { round_trip(large_bytes); });
    transfer(socket, true, &byte, 1);
    std::vector<char> source(large_bytes, 'x');
    std::vector<char> target(large_bytes);
    const double memcpy_us = median_us(large_rounds, [&] {
        std::memcpy(target.data(), source.data(), large_bytes);
        asm volatile("" : : "r"(target.data()) : "memory");
    });
    std::printf(
        "{\"ucx_version\": \"%s\", \"ucx_round_trip_us\": %.3f, \"ucx_1mib_round_trip_us\": %.1f, "
        "\"socket_round_trip_us\": %.2f, \"memcpy_1mib_us\": %.2f}\n",
        ucx.version.c_str(), small_us, large_us, socket_us, memcpy_us);
}

}  // namespace

int main(int count, char** arguments) {
    require(count == 2, "usage: floors /path/to/libucp.so.0;");
    int sockets[2];
    require(socketpair(AF_UNIX, SOCK_STREAM, 0, sockets) == 0, "socketpair");
    const pid_t child = fork();
    pin(child == 0 ? 1 : 0);
    const isthmus::UcxLibrary ucx = isthmus::UcxLibrary::load(arguments[1]);
    if (child == 0) {
        echo(ucx, sockets[1]);
        _exit(0);
    }
    measure(ucx, sockets[0]);
    int status = 0;
    waitpid(child, &status, 0);
    return status;
}
