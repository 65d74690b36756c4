// The expert store alone: contents, eviction, edges, errors, and runs that get in each other's way.
// Builds with -fsanitize=thread, which is how scripts/development/check_expert_store runs it.

#include "../src/llama-expert-store.h"

#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml-cpu.h"

#undef NDEBUG
#include <cassert>

#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <set>
#include <stdexcept>
#include <thread>

#include <fcntl.h>
#include <sys/stat.h>

#ifdef _WIN32
int main() { return 0; } // the reads are made with POSIX calls here
#else
#include <dirent.h>
#include <sys/uio.h>
#include <unistd.h>

using store_t = llama_expert_store;

static int64_t plain_read(int fd, const store_t::buffer * buffers, size_t n, uint64_t offset) {
    std::vector<iovec> iov(n);
    for (size_t i = 0; i < n; ++i) {
        iov[i] = { buffers[i].data, buffers[i].size };
    }
    const ssize_t got = preadv(fd, iov.data(), n, offset);
    return got < 0 ? -errno : got;
}

// A file of random weights: pools of three parts, the last of another type, which begin at odd places.
struct model {
    static constexpr int n_expert = 8;

    std::string       path = "test-expert-store.XXXXXX";
    int               fd   = -1;
    std::vector<char> bytes;
    store_t::params   params;

    model(int n_pools, ggml_type gate, ggml_type down, int64_t n_embd, int64_t n_ff, size_t odd) {
        std::mt19937 rng(0);

        bytes.resize(odd);
        for (int i = 0; i < n_pools; ++i) {
            std::vector<store_t::part> parts;
            for (int part = 0; part < 3; ++part) {
                const ggml_type type = part == 2 ? down : gate;
                const int64_t   ne0  = part == 2 ? n_ff : n_embd;
                const int64_t   ne1  = part == 2 ? n_embd : n_ff;

                parts.push_back({ type, ne0, ne1, 0, bytes.size() });

                std::vector<float> rows(ne0*ne1*n_expert);
                for (float & x : rows) {
                    x = std::normal_distribution<float>()(rng);
                }
                const size_t begin = bytes.size();
                bytes.resize(begin + ggml_row_size(type, ne0)*ne1*n_expert);
                ggml_quantize_chunk(type, rows.data(), bytes.data() + begin, 0, ne1*n_expert, ne0, nullptr);
            }
            params.pools.push_back(parts);
            params.steps.insert(params.steps.end(), 2, i); // two steps share a pool
        }

        fd = mkstemp(&path[0]);
        assert(fd >= 0 && write(fd, bytes.data(), bytes.size()) == (ssize_t) bytes.size());

        params.files    = { fd };
        params.n_expert = n_expert;
        params.read     = plain_read;
        params.max_bytes = 1 << 30;
    }

    ~model() {
        close(fd);
        unlink(path.c_str());
    }

    size_t size(int pool, int part) const {
        const auto & p = params.pools[pool][part];
        return ggml_row_size(p.type, p.ne0)*p.ne1;
    }

    void set_slots(int n) {
        params.max_bytes = 1 << 30;
        params.max_bytes = store_t(params).slot_bytes()*n;
    }

    // what a tensor of one matrix holds when the backend is given the file's bytes all at once
    std::vector<char> expected(const store_t & store, int pool, int part, int expert) const {
        const char * data = bytes.data() + params.pools[pool][part].offset + expert*size(pool, part);

        ggml_init_params ctx_params = { 2*ggml_tensor_overhead(), nullptr, true };
        ggml_context_ptr ctx { ggml_init(ctx_params) };

        const auto & p = params.pools[pool][part];
        ggml_tensor * t = ggml_new_tensor_2d(ctx.get(), p.type, p.ne0, p.ne1);

        ggml_backend_buffer_ptr buffer { ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(),
                ggml_backend_buffer_get_type(store.weights(pool, part)->buffer)) };
        ggml_backend_tensor_set(t, data, 0, size(pool, part));

        return { (char *) t->data, (char *) t->data + size(pool, part) };
    }

    void check(const store_t & store, int step, const std::vector<int32_t> & ids, const std::vector<int32_t> & slots) const {
        assert(ids.size() == slots.size());
        const int pool = params.steps[step];
        for (size_t i = 0; i < ids.size(); ++i) {
            for (int part = 0; part < 3; ++part) {
                const ggml_tensor * w = store.weights(pool, part);
                assert(slots[i] >= 0 && slots[i] < w->ne[2]);
                const auto want = expected(store, pool, part, ids[i]);
                assert(memcmp((const char *) w->data + slots[i]*w->nb[2], want.data(), want.size()) == 0);
            }
        }
    }
};

static std::vector<int32_t> choose(std::mt19937 & rng, int n) {
    std::vector<int32_t> ret(model::n_expert);
    for (int i = 0; i < model::n_expert; ++i) {
        ret[i] = i;
    }
    std::shuffle(ret.begin(), ret.end(), rng);
    ret.resize(n);
    return ret;
}

// as a graph does with pre-gating: a step is announced before the one before it is computed
static std::string compute(const model & m, store_t & store, std::mt19937 & rng, int n_used, bool is_announced, int n_helpers = 1) {
    const int n_steps = (int) m.params.steps.size();

    store_t::run run(store);
    run.begin();

    std::vector<std::vector<int32_t>> ids;
    for (int step = 0; step < n_steps; ++step) {
        ids.push_back(choose(rng, n_used));
    }
    if (is_announced) {
        run.announce(0, ids[0]);
    }
    for (int step = 0; step < n_steps; ++step) {
        if (is_announced && step + 1 < n_steps) {
            run.announce(step + 1, ids[step + 1]);
        }
        std::vector<std::thread> helpers;
        for (int i = 0; i < n_helpers; ++i) {
            helpers.emplace_back([&] { run.assist(step); });
        }
        const auto slots = run.acquire(step, ids[step]);
        for (auto & helper : helpers) {
            helper.join();
        }
        const auto failed = std::vector<int32_t>(ids[step].size(), 0);
        if (slots != failed || n_used == 1) {
            m.check(store, step, ids[step], slots);
        } else {
            return run.end();
        }
    }
    return run.end();
}

static void test_contents() {
    const ggml_type types[][2] = {
        { GGML_TYPE_F32,  GGML_TYPE_F32  }, { GGML_TYPE_Q4_0, GGML_TYPE_Q8_0 }, { GGML_TYPE_IQ4_NL, GGML_TYPE_Q4_0 },
        { GGML_TYPE_Q4_K, GGML_TYPE_Q5_0 }, { GGML_TYPE_BF16, GGML_TYPE_Q6_K }, { GGML_TYPE_Q2_K,   GGML_TYPE_F16  },
    };
    for (const auto & type : types) {
        for (const size_t odd : { 0, 32, 4064, 12345*32 }) {
            for (const bool direct : { true, false }) {
                model m(3, type[0], type[1], 256, type[1] == GGML_TYPE_Q6_K ? 256 : 96, odd);
                m.params.direct_io = direct;
                for (const int n_slots : { 3, 4, 7, 13, 24, 1000 }) {
                    m.set_slots(std::min(n_slots, 24));
                    store_t store(m.params);
                    std::mt19937 rng(n_slots);
                    uint64_t n_used = 0;
                    for (int i = 0; i < 3; ++i) {
                        assert(compute(m, store, rng, 3, i > 0) == "");
                        n_used += 6*3;
                    }
                    const auto s = store.stats();
                    assert(s.hits + s.misses == n_used && s.wasted == 0 && s.n_experts == 24);
                    assert(s.bytes_read == s.misses*(2*m.size(0, 0) + m.size(0, 2)));
                    assert(n_slots < 24 || s.misses <= 24);
                }
            }
        }
    }
}

static void test_merging() {
    // slices of whole pages can be read together, wherever they begin
    for (const size_t odd : { 0, 96 }) {
        model m(1, GGML_TYPE_F32, GGML_TYPE_F32, 128, 64, odd);
        store_t store(m.params);
        store_t::run run(store);
        run.begin();
        const std::vector<int32_t> ids = { 5, 1, 2, 3, 7, 0 }; // 0 to 3, 5, 7
        m.check(store, 0, ids, run.acquire(0, ids));
        assert(store.stats().reads == 3*3);
        assert(run.end() == "");
    }
}

static void test_eviction() {
    model m(3, GGML_TYPE_F32, GGML_TYPE_F32, 64, 32, 0);
    m.set_slots(6);
    store_t store(m.params);
    store_t::run run(store);
    const auto use = [&](int step, const std::vector<int32_t> & ids) {
        m.check(store, step, ids, run.acquire(step, ids));
    };
    run.begin();
    use(0, { 0, 1 }); // pool 0
    use(2, { 0, 1 }); // pool 1
    use(4, { 0, 1 }); // pool 2
    // the pool that was just left goes, not the one that comes next
    use(0, { 2, 3 });
    uint64_t misses = store.stats().misses;
    use(0, { 0, 1 });
    assert(store.stats().misses == misses);
    run.end();

    // of experts of one pool, the one that is used less
    model one(1, GGML_TYPE_F32, GGML_TYPE_F32, 64, 32, 0);
    one.params.steps = { 0 };
    one.set_slots(3);
    store_t other(one.params);
    store_t::run again(other);
    for (const int e : { 4, 5, 4, 5, 6, 4, 5, 7 }) {
        again.begin();
        again.acquire(0, { e });
        again.end();
    }
    misses = other.stats().misses;
    again.begin();
    again.acquire(0, { 4, 5 });
    assert(other.stats().misses == misses);
    again.end();
}

static void test_nothing_wasted() {
    // two steps at once do not fit: what the nearer one needs is not given to the farther one
    model m(3, GGML_TYPE_F32, GGML_TYPE_F32, 64, 32, 0);
    for (const int n_slots : { 4, 5, 6, 7, 8 }) {
        m.set_slots(n_slots);
        store_t store(m.params);
        std::mt19937 rng(1);
        for (int i = 0; i < 50; ++i) {
            assert(compute(m, store, rng, 4, true) == "");
        }
        assert(store.stats().wasted == 0);
    }

    // what was wanted once is no more when its run is over: an announcement finds slots
    m.set_slots(2);
    store_t store(m.params);
    store_t::run run(store);
    for (const int step : { 0, 2, 4 }) {
        const uint64_t before = store.stats().reads;
        run.begin();
        run.announce(step, { 0, 1 });
        for (int i = 0; i < 1000 && store.stats().reads == before; ++i) {
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
        }
        assert(store.stats().reads > before);
        run.acquire(step, { 0, 1 });
        run.end();
    }
}

static void test_edges() {
    model m(2, GGML_TYPE_Q4_0, GGML_TYPE_Q4_0, 64, 32, 32);

    m.params.max_bytes = 100;
    try {
        store_t store(m.params);
        assert(false);
    } catch (const std::runtime_error & e) {
        assert(strstr(e.what(), "an expert cache of 100 bytes holds 0 experts, and 2 are used at once: at least "));
    }

    m.set_slots(4);
    store_t store(m.params);
    std::mt19937 rng(2);
    assert(compute(m, store, rng, 4, true) == "");
    const std::string error = compute(m, store, rng, 5, true);
    assert(error == "5 experts are needed at once, but there is memory for 4");
    assert(compute(m, store, rng, 4, true) == "");

    // resizing
    m.params.max_bytes = store.slot_bytes()*16;
    store_t big(m.params);
    assert(compute(m, big, rng, 4, true) == "");
    assert(!big.resize(big.slot_bytes()*3, 4) && big.n_slots() == 16);
    assert(big.resize(big.slot_bytes()*5, 4) && big.n_slots() == 5);
    for (int i = 0; i < 5; ++i) {
        assert(compute(m, big, rng, 4, true) == "");
    }
    assert(big.resize(1 << 30) && big.n_slots() == 16);
    for (int i = 0; i < 5; ++i) {
        assert(compute(m, big, rng, 4, true) == "");
    }
    const auto before = big.stats();
    assert(compute(m, big, rng, 4, true) == "" && big.stats().misses - before.misses <= 2);

    // the same expert for several tokens
    store_t::run run(big);
    run.begin();
    m.check(big, 1, { 3, 3, 2, 3 }, run.acquire(1, { 3, 3, 2, 3 }));
    m.check(big, 2, {}, run.acquire(2, {}));
    run.end();
}

static void test_errors() {
    model m(2, GGML_TYPE_Q4_0, GGML_TYPE_Q8_0, 256, 64, 32);
    m.set_slots(5);
    std::mt19937 rng(3);

    std::atomic<int> code { 0 };
    m.params.read = [&](int fd, const store_t::buffer * buffers, size_t n, uint64_t offset) -> int64_t {
        return code < 0 ? (int64_t) code : plain_read(fd, buffers, n, offset);
    };
    for (const bool is_announced : { true, false }) {
        store_t store(m.params);
        assert(compute(m, store, rng, 4, is_announced) == "");
        code = -EIO;
        const std::string error = compute(m, store, rng, 4, is_announced);
        assert(error == std::string("the model's file cannot be read: ") + strerror(EIO));
        code = 0; // and the next graph tries again
        for (int i = 0; i < 3; ++i) {
            assert(compute(m, store, rng, 4, is_announced) == "");
        }
    }

    // reads that give less than was asked for, and that are interrupted
    std::atomic<int> calls { 0 };
    m.params.direct_io = false;
    m.params.read = [&](int fd, const store_t::buffer * buffers, size_t n, uint64_t offset) -> int64_t {
        if (++calls % 3 == 0) {
            return -EINTR;
        }
        const store_t::buffer some = { buffers[0].data, std::min<size_t>(buffers[0].size, 1000) };
        GGML_UNUSED(n);
        return plain_read(fd, &some, 1, offset);
    };
    {
        store_t store(m.params);
        assert(compute(m, store, rng, 4, true) == "");
    }

    // a file system that takes O_DIRECT and refuses to read so
    m.params.direct_io = true;
    m.params.read = [&](int fd, const store_t::buffer * buffers, size_t n, uint64_t offset) -> int64_t {
#ifdef O_DIRECT
        if (fcntl(fd, F_GETFL) & O_DIRECT) {
            return -EINVAL;
        }
#endif
        return plain_read(fd, buffers, n, offset);
    };
    {
        store_t store(m.params);
        for (int i = 0; i < 3; ++i) {
            assert(compute(m, store, rng, 4, true) == "");
        }
    }

    // a file that is written to, and one that is cut
    m.params.read = plain_read;
    {
        store_t store(m.params);
        assert(compute(m, store, rng, 4, true) == "");
        usleep(20000); // beyond the resolution of time stamps
        assert(pwrite(m.fd, m.bytes.data(), 1, 0) == 1);
        assert(compute(m, store, rng, 4, true) == "the model's file has changed since it was loaded");
        assert(compute(m, store, rng, 4, true) == "the model's file has changed since it was loaded");
    }
    {
        store_t store(m.params);
        assert(ftruncate(m.fd, m.bytes.size()/2) == 0);
        std::string error;
        for (int i = 0; i < 20 && error.empty(); ++i) {
            error = compute(m, store, rng, 4, true);
        }
        assert(error == "the model's file has changed since it was loaded");
    }
    {
        store_t store(m.params); // short from the start
        std::string error;
        for (int i = 0; i < 20 && error.empty(); ++i) {
            error = compute(m, store, rng, 4, true);
        }
        assert(error == "the model's file ends early");
    }
}

static void test_concurrent_runs() {
    model m(3, GGML_TYPE_Q4_0, GGML_TYPE_F32, 256, 64, 64);
    for (const int n_slots : { 4, 6, 12 }) {
        m.set_slots(n_slots);
        store_t store(m.params);

        std::vector<std::thread> threads;
        for (int t = 0; t < 3; ++t) {
            threads.emplace_back([&, t] {
                std::mt19937 rng(t);
                for (int i = 0; i < 60; ++i) {
                    if (i % 5 == 4) { // a graph that is given up
                        store_t::run run(store);
                        run.begin();
                        run.announce(0, choose(rng, 4));
                        run.announce(1, choose(rng, 4));
                        if (i % 2) {
                            run.acquire(0, choose(rng, 4));
                        }
                        continue;
                    }
                    assert(compute(m, store, rng, 4, i % 7 != 0) == "");
                }
            });
        }
        for (int i = 0; i < 20 && n_slots == 12; ++i) {
            store.resize(store.slot_bytes()*(i % 2 ? 12 : 5), 4);
            usleep(1000);
        }
        for (auto & thread : threads) {
            thread.join();
        }
    }
}

static int count_files() {
    int n = 0;
    DIR * dir = opendir("/proc/self/fd");
    while (dir && readdir(dir)) {
        ++n;
    }
    if (dir) {
        closedir(dir);
    }
    return n;
}

static void test_loading_and_unloading() {
    model m(2, GGML_TYPE_Q4_0, GGML_TYPE_Q4_0, 64, 32, 32);
    m.params.read = [](int fd, const store_t::buffer * buffers, size_t n, uint64_t offset) -> int64_t {
        usleep(200);
        return plain_read(fd, buffers, n, offset);
    };
    const int before = count_files();
    for (int i = 0; i < 100; ++i) {
        store_t store(m.params);
        store_t::run run(store);
        run.begin();
        run.announce(0, { 0, 1, 2, 3, 4 }); // still being read when the store goes
    }
    assert(count_files() == before);
}

int main() {
    setvbuf(stdout, nullptr, _IONBF, 0);
    alarm(900); // a deadlock is a failure
    const std::pair<const char *, void (*)()> tests[] = {
        { "contents",              test_contents              },
        { "merging",               test_merging               },
        { "eviction",              test_eviction              },
        { "nothing wasted",        test_nothing_wasted        },
        { "edges",                 test_edges                 },
        { "errors",                test_errors                },
        { "concurrent runs",       test_concurrent_runs       },
        { "loading and unloading", test_loading_and_unloading },
    };
    for (const auto & [name, test] : tests) {
        printf("%s ... ", name);
        test();
        printf("ok\n");
    }
    return 0;
}
#endif
