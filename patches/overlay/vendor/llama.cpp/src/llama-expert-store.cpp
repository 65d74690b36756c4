#include "llama-expert-store.h"

#include "llama-impl.h"

#include "ggml-backend.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <climits>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <system_error>

#include <fcntl.h>
#include <sys/stat.h>

#ifdef _WIN32
#include <io.h>
#include <malloc.h>
#else
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>
#endif

static uint64_t us_since(std::chrono::steady_clock::time_point start) {
    return std::chrono::duration_cast<std::chrono::microseconds>(std::chrono::steady_clock::now() - start).count();
}

//
// memory
//

// Reserved, not committed: a slot takes memory once something is read into it.
static char * arena_alloc(size_t size) {
#ifdef _WIN32
    return (char *) _aligned_malloc(size, 4096);
#else
#ifdef MAP_NORESERVE
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
#else
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS;
#endif
    void * data = mmap(nullptr, size, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (data == MAP_FAILED) {
        return nullptr;
    }
#ifdef MADV_HUGEPAGE
    madvise(data, size, MADV_HUGEPAGE); // fewer TLB misses, and fewer pages to pin for a direct read
#endif
    return (char *) data;
#endif
}

static void arena_free(char * data, size_t size) {
#ifdef _WIN32
    GGML_UNUSED(size);
    _aligned_free(data);
#else
    munmap(data, size);
#endif
}

static void arena_release(char * data, size_t size) {
#if defined(MADV_DONTNEED) && !defined(_WIN32)
    madvise(data, size, MADV_DONTNEED);
#else
    GGML_UNUSED(data);
    GGML_UNUSED(size);
#endif
}

//
// files
//

#ifdef _WIN32
static int64_t read_default(int fd, const llama_expert_store::buffer * buffers, size_t n_buffers, uint64_t offset) {
    static std::mutex mutex; // a descriptor has one position
    std::lock_guard<std::mutex> lock(mutex);

    int64_t done = 0;
    if (_lseeki64(fd, offset, SEEK_SET) < 0) {
        return -errno;
    }
    for (size_t i = 0; i < n_buffers; ++i) {
        const int n = _read(fd, buffers[i].data, (unsigned) std::min<size_t>(buffers[i].size, INT32_MAX));
        if (n < 0) {
            return -errno;
        }
        done += n;
        if ((size_t) n < buffers[i].size) {
            break;
        }
    }
    return done;
}
#else
static int64_t read_default(int fd, const llama_expert_store::buffer * buffers, size_t n_buffers, uint64_t offset) {
    std::vector<iovec> iov(n_buffers);
    for (size_t i = 0; i < n_buffers; ++i) {
        iov[i] = { buffers[i].data, buffers[i].size };
    }
    const ssize_t n = preadv(fd, iov.data(), (int) n_buffers, (off_t) offset);
    return n < 0 ? -errno : n;
}
#endif

struct llama_expert_store::file {
    int  fd     = -1;
    std::atomic<bool> direct { false };

    struct stat first = {};

    // a description of its own, so that direct I/O here does not disturb the loader, nor the loader's end us
    file(int source, bool want_direct) {
#if defined(__linux__) && defined(O_DIRECT)
        const std::string path = "/proc/self/fd/" + std::to_string(source);
        if (want_direct) {
            fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT);
        }
        direct = fd >= 0;
        if (!direct) {
            fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
        }
#endif
        GGML_UNUSED(want_direct);
        if (fd < 0) {
#ifdef _WIN32
            fd = _dup(source);
#else
            fd = dup(source);
#if defined(F_NOCACHE)
            fcntl(fd, F_NOCACHE, want_direct ? 1 : 0);
#endif
#endif
        }
        if (fd < 0 || fstat(fd, &first) != 0) {
            throw std::runtime_error(format("expert cache: the model's file cannot be opened again: %s", strerror(errno)));
        }
    }

    ~file() {
#ifdef _WIN32
        _close(fd);
#else
        close(fd);
#endif
    }

    // some file systems accept the flag and refuse the reads
    bool give_up_direct() {
#if defined(__linux__) && defined(O_DIRECT)
        const int flags = fcntl(fd, F_GETFL);
        return flags >= 0 && fcntl(fd, F_SETFL, flags & ~O_DIRECT) == 0;
#else
        return false;
#endif
    }

    bool has_changed() const {
        struct stat now = {};
        if (fstat(fd, &now) != 0 || now.st_size != first.st_size || now.st_mtime != first.st_mtime) {
            return true;
        }
#ifdef __linux__
        return now.st_mtim.tv_nsec != first.st_mtim.tv_nsec;
#else
        return false;
#endif
    }
};

//
// construction
//

static bool is_usable(ggml_backend_dev_t dev, ggml_backend_buffer_t home, const llama_expert_store::part & p) {
    ggml_init_params params = { 4*ggml_tensor_overhead(), nullptr, true };
    ggml_context_ptr ctx { ggml_init(params) };

    ggml_tensor * w   = ggml_new_tensor_3d(ctx.get(), p.type,        p.ne0, p.ne1, 2);
    ggml_tensor * b   = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, p.ne0, 2, 1);
    ggml_tensor * ids = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_I32, 2, 1);

    w->buffer = home;

    return ggml_backend_dev_supports_op(dev, ggml_mul_mat_id(ctx.get(), w, b, ids));
}

llama_expert_store::llama_expert_store(const params & p) : steps(p.steps), read_file(p.read ? p.read : read_default) {
    ggml_backend_dev_t cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    if (!cpu) {
        throw std::runtime_error("expert cache: no CPU backend found");
    }

    // the order in which llama_model_loader prefers them. A buffer of its type, but not of its size, serves as the
    // tensors' buffer: all slots lie in the arena
    std::vector<ggml_backend_buffer_type_t> bufts;
    if (p.use_extra_bufts) {
        auto * get_extra_bufts = (ggml_backend_dev_get_extra_bufts_t) ggml_backend_reg_get_proc_address(
                ggml_backend_dev_backend_reg(cpu), "ggml_backend_dev_get_extra_bufts");
        for (auto * buft = get_extra_bufts ? get_extra_bufts(cpu) : nullptr; buft && *buft; ++buft) {
            if (strcmp(ggml_backend_buft_name(*buft), "CPU_REPACK") == 0) { // the one that settle() knows about
                bufts.push_back(*buft);
            }
        }
    }
    bufts.push_back(ggml_backend_dev_buffer_type(cpu));
    for (auto * buft : bufts) {
        homes.emplace_back(ggml_backend_buft_alloc_buffer(buft, PAGE));
        if (!homes.back()) {
            throw std::runtime_error("expert cache: out of memory");
        }
    }

    for (const int fd : p.files) {
        files.push_back(std::make_unique<file>(fd, p.direct_io));
    }

    for (const auto & parts : p.pools) {
        GGML_ASSERT(parts.size() <= MAX_PARTS);

        pool cur;
        cur.parts = parts;
        cur.slot_of.assign(p.n_expert, -1);
        cur.seen   .assign(p.n_expert, false);
        cur.freq   .assign(p.n_expert, 0.0f);
        cur.worth  .assign(p.n_expert, 0.0f);

        size_t size = 0;
        for (const auto & part : parts) {
            cur.offset.push_back(size);
            size += GGML_PAD(slice(part) + 2*PAGE, PAGE); // aligned reads begin before the part and end after it
        }
        stride = std::max(stride, size);

        pools.push_back(std::move(cur));
    }

    const uint64_t n_all   = (uint64_t) p.n_expert*pools.size();
    const uint64_t n_slots = std::min<uint64_t>(n_all, stride ? p.max_bytes/stride : 0);
    const uint64_t n_least = std::min<uint64_t>(n_all, std::max(p.min_slots, 2));
    if (n_slots < n_least) {
        throw std::runtime_error(format("an expert cache of %llu bytes holds %llu experts, and %llu are used at once: "
                "at least %llu bytes are needed", (unsigned long long) p.max_bytes, (unsigned long long) n_slots,
                (unsigned long long) n_least, (unsigned long long) (n_least*stride)));
    }

    const size_t size = n_slots*stride;
    arena = { arena_alloc(size), [size](char * data) { arena_free(data, size); } };
    if (!arena) {
        throw std::runtime_error(format("expert cache: cannot reserve %zu bytes", size));
    }

    slots.resize(n_slots);
    limit = (int) n_slots;
    for (int i = limit; i-- > 0;) {
        empty.push_back(i);
    }

    ggml_init_params params = { (pools.size()*MAX_PARTS + 1)*ggml_tensor_overhead(), nullptr, true };
    ctx.reset(ggml_init(params));

    for (auto & cur : pools) {
        for (size_t i = 0; i < cur.parts.size(); ++i) {
            const part & part = cur.parts[i];

            ggml_tensor * t = ggml_new_tensor_3d(ctx.get(), part.type, part.ne0, part.ne1, n_slots);
            t->nb[2] = stride;
            t->nb[3] = stride*n_slots;
            t->data  = arena.get() + cur.offset[i];

            const auto home = std::find_if(homes.begin(), homes.end(), [&](const auto & h) { return is_usable(cpu, h.get(), part); });
            if (home == homes.end()) {
                throw std::runtime_error(format("expert cache: the CPU backend cannot multiply experts of type %s", ggml_type_name(part.type)));
            }
            t->buffer = home->get();
            ggml_backend_buffer_init_tensor(t->buffer, t);

            cur.weights.push_back(t);
        }
    }

    // how far off a pool's next visit is, from just after a step
    const int n_steps = (int) steps.size();
    until.assign(n_steps, std::vector<float>(pools.size(), 1.0f));
    for (int step = 0; step < n_steps; ++step) {
        for (int ahead = n_steps; ahead > 0; --ahead) {
            until[step][steps[(step + ahead) % n_steps]] = (float) ahead/n_steps;
        }
    }

    const int n_threads = p.n_threads > 0 ? p.n_threads : N_THREADS;
    try {
        for (int i = 0; i < n_threads; ++i) {
            threads.emplace_back([this] { read_loop(); });
        }
    } catch (const std::system_error & e) {
        if (threads.empty()) {
            throw std::runtime_error(format("expert cache: cannot start a thread: %s", e.what()));
        }
    }
}

llama_expert_store::~llama_expert_store() {
    {
        std::lock_guard<std::mutex> lock(mutex);
        stop = true;
    }
    queued.notify_all();
    for (auto & thread : threads) {
        thread.join();
    }
}

size_t llama_expert_store::slice(const part & p) const {
    return ggml_row_size(p.type, p.ne0)*p.ne1;
}

char * llama_expert_store::region(int pool, int part, int slot) const {
    return arena.get() + slot*stride + pools[pool].offset[part];
}

ggml_tensor * llama_expert_store::weights(int pool, int part) const {
    return pools[pool].weights[part];
}

int llama_expert_store::n_slots() const {
    std::lock_guard<std::mutex> lock(mutex);
    return limit;
}

std::vector<bool> llama_expert_store::holds(int step) const {
    std::lock_guard<std::mutex> lock(mutex);
    std::vector<bool> ret;
    for (const int slot : pools[steps[step]].slot_of) {
        ret.push_back(slot >= 0);
    }
    return ret;
}

llama_expert_store_stats llama_expert_store::stats() const {
    std::lock_guard<std::mutex> lock(mutex);
    llama_expert_store_stats ret = counts;
    ret.n_slots    = limit;
    ret.slot_bytes = stride;
    ret.n_experts  = pools.size()*(pools.empty() ? 0 : pools[0].slot_of.size());
    return ret;
}

//
// slots
//

void llama_expert_store::clear(int i) {
    slot & s = slots[i];
    if (s.pool >= 0 && pools[s.pool].slot_of[s.expert] == i) {
        pools[s.pool].slot_of[s.expert] = -1;
        counts.wasted += !s.used;
    }
    const uint64_t load = s.load;
    s = {};
    s.load = load + 1;
}

// what failed to load is kept until its users have noticed
void llama_expert_store::recycle(int i) {
    const slot & s = slots[i];
    if (s.failed && s.pins == 0 && !s.is_busy()) {
        clear(i);
        if (i < limit) {
            empty.push_back(i);
        }
    }
}

// A slot to load into, or -1. The victim is the expert whose next use is farthest off, as far as one can tell: its pool
// is visited by steps that are known, and there it is the more likely to be chosen the more often it was of late.
// Least recently used would be the worst choice here: it drops the very pool that comes next.
int llama_expert_store::take(int step, bool from_others) {
    if (!empty.empty()) {
        const int i = empty.back();
        empty.pop_back();
        return i;
    }

    int   best       = -1;
    float best_worth = INFINITY;
    for (int i = 0; i < limit; ++i) {
        const slot & s = slots[i];
        if (!s.can_go() || (s.wants > 0 && !from_others)) {
            continue;
        }
        const float worth = pools[s.pool].worth[s.expert] - until[step][s.pool] + (s.wants > 0 ? 100.0f : 0.0f);
        if (worth < best_worth) {
            best       = i;
            best_worth = worth;
        }
    }
    if (best >= 0) {
        clear(best);
    }
    return best;
}

void llama_expert_store::visit(int step, const std::vector<int> & experts) {
    // what a visit counts against the one after it, and frequency against the distance of the next visit. Tried on
    // uniform, skewed, drifting and recorded routing: scripts/benchmarks/simulate_eviction.py
    constexpr float decay  = 0.95f;
    constexpr float weight = 0.5f;

    pool & cur = pools[steps[step]];
    for (const int e : experts) {
        cur.seen[e] = true;
    }
    if (steps[(step + 1) % steps.size()] == steps[step] && steps.size() > 1) {
        return;
    }
    for (size_t e = 0; e < cur.freq.size(); ++e) {
        cur.freq [e] = decay*cur.freq[e] + (cur.seen[e] ? 1.0f : 0.0f);
        cur.worth[e] = weight*logf(cur.freq[e] + 0.3f);
        cur.seen [e] = false;
    }
}

bool llama_expert_store::resize(uint64_t bytes, int min_slots) {
    std::unique_lock<std::mutex> lock(mutex);

    const int target = (int) std::min<uint64_t>(slots.size(), bytes/stride);
    if (target < std::min<int>(min_slots, (int) slots.size())) {
        return false;
    }

    const int before = limit;
    limit = target; // nothing new from here on
    empty.erase(std::remove_if(empty.begin(), empty.end(), [&](int i) { return i >= target; }), empty.end());

    for (int i = target; i < before; ++i) {
        changed.wait(lock, [&] { return slots[i].pins == 0 && !slots[i].is_busy(); });
        clear(i);
    }
    for (int i = before; i < target; ++i) {
        empty.insert(empty.begin(), i);
    }
    if (target < before) {
        arena_release(arena.get() + target*stride, (before - target)*stride);
    }
    return true;
}

//
// reading
//

void llama_expert_store::queue(int i_pool, const std::vector<int> & experts, const std::vector<int> & in, bool urgent) {
    const pool & cur = pools[i_pool];

    std::vector<job> list;
    for (size_t first = 0; first < experts.size();) {
        size_t last = first + 1;
        while (last < experts.size() && experts[last] == experts[last - 1] + 1) {
            ++last;
        }
        // adjacent experts at once, if no page holds a piece of two of them
        for (int part = 0; part < (int) cur.parts.size(); ++part) {
            const size_t size  = slice(cur.parts[part]);
            const bool   fits  = !files[cur.parts[part].file]->direct || size % PAGE == 0;
            const size_t count = fits ? std::max<size_t>(1, MAX_MERGE/size) : 1;

            for (size_t i = first; i < last; i += count) {
                const size_t end = std::min(i + count, last);
                list.push_back({ i_pool, part, experts[i], std::vector<int>(in.begin() + i, in.begin() + end) });
            }
        }
        first = last;
    }

    jobs.insert(urgent ? jobs.begin() : jobs.end(), list.begin(), list.end());
    for (size_t i = 0; i < std::min(list.size(), threads.size()); ++i) {
        queued.notify_one();
    }
}

std::string llama_expert_store::read(const job & j, std::vector<uint32_t> & shift) {
    const part & part = pools[j.pool].parts[j.part];
    file       & from = *files[part.file];

    const size_t   size  = slice(part);
    const uint64_t begin = part.offset + (uint64_t) j.expert*size;
    const size_t   n     = j.slots.size();

    for (bool direct = from.direct;; direct = false) {
        const uint64_t start = direct ? begin/PAGE*PAGE : begin;
        const size_t   skip  = begin - start;
        const size_t   need  = skip + n*size;

        std::vector<buffer> buffers;
        for (size_t i = 0; i < n; ++i) {
            buffers.push_back({ region(j.pool, j.part, j.slots[i]), size });
        }
        buffers.back().size = (direct ? GGML_PAD(need, PAGE) : need) - (n - 1)*size;

        size_t done = 0;
        int    code = 0;
        while (done < need) {
            const int64_t got = read_file(from.fd, buffers.data(), buffers.size(), start + done);
            if (got == -EINTR) {
                continue;
            }
            if (got <= 0) {
                code = got == 0 ? -1 : (int) -got;
                break;
            }
            done += got;
            // on with what is left, which after a short read begins in the middle of a buffer
            for (size_t left = got; left > 0;) {
                const size_t step = std::min(left, buffers.front().size);
                buffers.front().data = (char *) buffers.front().data + step;
                buffers.front().size -= step;
                left -= step;
                if (buffers.front().size == 0 && buffers.size() > 1) {
                    buffers.erase(buffers.begin());
                } else if (left > 0) {
                    break;
                }
            }
        }
        if (code == EINVAL && direct && from.give_up_direct()) {
            LLAMA_LOG_WARN("%s: the file system refuses direct reads; reading through the page cache\n", __func__);
            from.direct = false;
            continue; // without direct
        }

        // also when the read succeeded: what was read may be half old, half new
        if (from.has_changed()) {
            return "the model's file has changed since it was loaded";
        }
        if (code != 0) {
            return code == -1 ? "the model's file ends early" : format("the model's file cannot be read: %s", strerror(code));
        }

        // a part ends in what was read ahead of the next one
        for (size_t i = 0; skip > 0 && i + 1 < n; ++i) {
            memcpy(region(j.pool, j.part, j.slots[i]) + size, region(j.pool, j.part, j.slots[i + 1]), skip);
        }
        shift.assign(n, (uint32_t) skip);
        return "";
    }
}

void llama_expert_store::read_loop() {
    std::unique_lock<std::mutex> lock(mutex);
    std::vector<uint32_t> shift;

    for (;;) {
        queued.wait(lock, [&] { return stop || !jobs.empty(); });
        if (stop) {
            return;
        }
        const job j = std::move(jobs.front());
        jobs.pop_front();

        lock.unlock();
        const std::string error = read(j, shift);
        lock.lock();

        const pool & cur = pools[j.pool];
        counts.reads      += 1;
        counts.bytes_read += j.slots.size()*slice(cur.parts[j.part]);

        for (size_t i = 0; i < j.slots.size(); ++i) {
            slot & s = slots[j.slots[i]];
            s.reading--;
            if (!error.empty()) {
                if (!s.failed) {
                    s.failed = true;
                    pools[s.pool].slot_of[s.expert] = -1; // so that the next to ask reads again
                }
                read_error = error;
            } else {
                s.shift[j.part] = shift[i];
                const bool is_final = shift[i] == 0 && ggml_backend_buffer_is_host(cur.weights[j.part]->buffer);
                s.raw |= is_final ? 0 : 1u << j.part;
            }
            recycle(j.slots[i]);
        }
        changed.notify_all();
    }
}

//
// settling
//

// From where a part was read to where the kernels expect it, in the layout they expect. In place: rows are taken from
// the front and never end up behind where they came from.
void llama_expert_store::settle(int i_pool, int i_part, int i_slot, size_t shift) {
    const pool  & cur = pools[i_pool];
    const part  & p   = cur.parts[i_part];
    ggml_tensor * all = cur.weights[i_part];

    char       * to   = region(i_pool, i_part, i_slot);
    const char * from = to + shift;

    if (ggml_backend_buffer_is_host(all->buffer)) {
        memmove(to, from, slice(p));
        return;
    }

    constexpr int64_t n_rows = 64; // a multiple of every interleaving there is, and a piece that caches hold

    const size_t row = ggml_row_size(p.type, p.ne0);

    static thread_local std::vector<char> piece;
    piece.resize(n_rows*row);

    for (int64_t i = 0; i < p.ne1; i += n_rows) {
        const int64_t n = std::min(n_rows, p.ne1 - i);
        memcpy(piece.data(), from + i*row, n*row);

        ggml_tensor rows = *all;
        rows.ne[1] = n;
        rows.ne[2] = 1;
        rows.nb[2] = n*row;
        rows.nb[3] = n*row;
        rows.data  = to + i*row;
        ggml_backend_tensor_set(&rows, piece.data(), 0, n*row);
    }
}

// Settle a part of slot i, if one has arrived. The lock is released meanwhile.
bool llama_expert_store::settle_one(std::unique_lock<std::mutex> & lock, int i) {
    slot & s = slots[i];
    if (s.raw == 0 || s.failed) {
        return false;
    }
    int part = 0;
    while (!(s.raw >> part & 1)) {
        ++part;
    }
    s.raw &= ~(1u << part);
    s.settling++;
    const int    pool  = s.pool;
    const size_t shift = s.shift[part];

    lock.unlock();
    const auto start = std::chrono::steady_clock::now();
    settle(pool, part, i, shift);
    const uint64_t us = us_since(start);
    lock.lock();

    s.settling--;
    recycle(i);
    counts.settle_us += us;
    changed.notify_all();
    return true;
}

//
// runs
//

std::vector<int> llama_expert_store::experts_of(const std::vector<int32_t> & ids) const {
    std::vector<int> ret(ids.begin(), ids.end());
    std::sort(ret.begin(), ret.end());
    ret.erase(std::unique(ret.begin(), ret.end()), ret.end());
    return ret;
}

void llama_expert_store::unpin(run & r) {
    for (const int i : r.held) {
        slots[i].pins--;
        recycle(i);
    }
    r.held.clear();
}

void llama_expert_store::unwant(run & r, int last_step) {
    const auto is_over = [&](const run::mark & m) {
        if (m.step > last_step) {
            return false;
        }
        if (slots[m.slot].load == m.load) {
            slots[m.slot].wants--;
        }
        return true;
    };
    r.wanted.erase(std::remove_if(r.wanted.begin(), r.wanted.end(), is_over), r.wanted.end());
    r.behind.erase(std::remove_if(r.behind.begin(), r.behind.end(), [&](const auto & b) { return b.first <= last_step; }), r.behind.end());
}

// Have missing experts read, as far as there are slots; returns those.
std::vector<int> llama_expert_store::load(int step, const std::vector<int> & experts, bool is_urgent) {
    const int i_pool = steps[step];

    std::vector<int> in;
    for (const int e : experts) {
        const int i = take(step, is_urgent);
        if (i < 0) {
            break;
        }
        slots[i].pool    = i_pool;
        slots[i].expert  = e;
        slots[i].reading = (int) pools[i_pool].parts.size();
        pools[i_pool].slot_of[e] = i;
        // or the next one would take it
        slots[i].pins = 1;
        in.push_back(i);
    }
    for (const int i : in) {
        slots[i].pins = 0;
    }
    queue(i_pool, { experts.begin(), experts.begin() + in.size() }, in, is_urgent);
    return in;
}

void llama_expert_store::run::begin() {
    end();
}

std::string llama_expert_store::run::end() {
    std::lock_guard<std::mutex> lock(store.mutex);
    store.unpin(*this);
    store.unwant(*this, INT_MAX);
    store.changed.notify_all();
    granted = -1;
    done    = -1;
    std::string ret;
    ret.swap(error);
    return ret;
}

void llama_expert_store::run::announce(int step, const std::vector<int32_t> & ids) {
    const std::vector<int> experts = store.experts_of(ids);

    std::lock_guard<std::mutex> lock(store.mutex);
    if (!error.empty()) {
        return;
    }
    // the router has read the state of step - 1, so what came before is done
    if (granted < step - 1) {
        store.unpin(*this);
    }

    // those that had no slot come first, or they would have to take one from this step
    behind.emplace_back(step, experts);
    for (auto & [earlier, missing] : behind) {
        const auto & slot_of = store.pools[store.steps[earlier]].slot_of;

        std::vector<int> in;
        const auto is_there = [&](int e) {
            if (slot_of[e] >= 0) {
                in.push_back(slot_of[e]);
            }
            return slot_of[e] >= 0;
        };
        const auto want = [&, earlier = earlier](int i) {
            store.slots[i].wants++;
            wanted.push_back({ earlier, i, store.slots[i].load });
        };
        missing.erase(std::remove_if(missing.begin(), missing.end(), is_there), missing.end());
        std::for_each(in.begin(), in.end(), want);

        in = store.load(earlier, missing, false);
        missing.erase(missing.begin(), missing.begin() + in.size());
        std::for_each(in.begin(), in.end(), want);

        if (!missing.empty()) {
            break;
        }
    }
    behind.erase(std::remove_if(behind.begin(), behind.end(), [](const auto & b) { return b.second.empty(); }), behind.end());
}

std::vector<int32_t> llama_expert_store::run::acquire(int step, const std::vector<int32_t> & ids) {
    const std::vector<int> experts = store.experts_of(ids);

    std::unique_lock<std::mutex> lock(store.mutex);
    store.unpin(*this);

    const auto start = std::chrono::steady_clock::now();
    bool has_waited  = false;

    const pool & cur = store.pools[store.steps[step]];

    const auto pin = [&](int i) {
        store.slots[i].pins++;
        held.push_back(i);
    };
    while (error.empty()) {
        std::vector<int> missing;
        for (const int e : experts) {
            if (cur.slot_of[e] >= 0) {
                pin(cur.slot_of[e]);
            } else {
                missing.push_back(e);
            }
        }
        store.unwant(*this, step);

        const auto n_free = store.empty.size() + std::count_if(store.slots.begin(), store.slots.begin() + store.limit,
                [](const slot & s) { return s.can_go(); });
        if (missing.size() <= (size_t) n_free) {
            const std::vector<int> in = store.load(step, missing, true);
            std::for_each(in.begin(), in.end(), pin);
            break;
        }
        if ((int) experts.size() > store.limit) {
            error = format("%zu experts are needed at once, but there is memory for %d", experts.size(), store.limit);
            break;
        }
        // other runs have the rest. Hold nothing while waiting, or two runs could wait for each other
        store.unpin(*this);
        store.changed.wait(lock);
        has_waited = true;
    }

    if (error.empty()) {
        for (const int i : held) {
            (store.slots[i].used ? store.counts.hits : store.counts.misses)++;
            store.slots[i].used = true;
            has_waited |= !store.slots[i].is_ready();
        }
        store.visit(step, experts);
    }
    granted = step;

    if (has_waited) {
        store.changed.notify_all();
        settle_until_done(lock);
        store.counts.wait_us += us_since(start);
    }

    std::vector<int32_t> ret(ids.size(), 0);
    for (size_t i = 0; i < ids.size() && error.empty(); ++i) {
        ret[i] = cur.slot_of[ids[i]];
    }
    done = step;
    store.changed.notify_all();
    return ret;
}

void llama_expert_store::run::assist(int step) {
    // most often there is nothing to do: then it is over before a thread could be put to sleep and woken
    constexpr uint64_t spin_us = 20;

    const auto start = std::chrono::steady_clock::now();
    while (us_since(start) < spin_us) {
        if (done == step) {
            return;
        }
    }

    std::unique_lock<std::mutex> lock(store.mutex);
    store.changed.wait(lock, [&] { return granted == step || done == step; });
    if (done != step) {
        settle_until_done(lock);
    }
}

// Lay out what has arrived until all is there; what has arrived for later steps, rather than do nothing.
void llama_expert_store::run::settle_until_done(std::unique_lock<std::mutex> & lock) {
    const auto settle_any = [&] {
        for (const int i : held) {
            if (store.settle_one(lock, i)) {
                return true;
            }
        }
        for (const auto & m : wanted) {
            if (store.slots[m.slot].load == m.load && store.settle_one(lock, m.slot)) {
                return true;
            }
        }
        return false;
    };
    while (error.empty()) {
        if (std::any_of(held.begin(), held.end(), [&](int i) { return store.slots[i].failed; })) {
            error = store.read_error;
            store.changed.notify_all();
        } else if (std::all_of(held.begin(), held.end(), [&](int i) { return store.slots[i].is_ready(); })) {
            break;
        } else if (!settle_any()) {
            store.changed.wait(lock);
        }
    }
}
