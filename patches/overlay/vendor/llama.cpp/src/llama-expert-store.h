#pragma once

#include "llama.h"

#include "ggml-cpp.h"

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

extern "C" {

// counts since the model was loaded, but for the last three
struct llama_expert_store_stats {
    uint64_t hits;       // experts used that were in memory
    uint64_t misses;     // experts used that had to be read
    uint64_t wasted;     // experts read and dropped before they were used
    uint64_t bytes_read; // of experts, without padding to pages
    uint64_t reads;      // requests to the file system
    uint64_t wait_us;    // graphs stood still for experts
    uint64_t settle_us;  // threads spent laying experts out, of that and besides
    uint64_t n_slots;
    uint64_t slot_bytes;
    uint64_t n_experts;  // in the file
};

// false: the model has no expert store
LLAMA_API bool llama_model_expert_store_stats(const struct llama_model * model, struct llama_expert_store_stats * stats);

// Change the memory for experts to `bytes` at most. False: no expert store, or less than a batch of n_ubatch needs
LLAMA_API bool llama_model_expert_store_resize(struct llama_model * model, uint64_t bytes, uint32_t n_ubatch);

// Why the last graph of this thread had no experts; empty: it had them, or there is no expert store
LLAMA_API const char * llama_model_expert_store_error(const struct llama_model * model);

// Size of the context's compute buffers, in bytes: memory that computing may use, and has not used at first
LLAMA_API uint64_t llama_context_compute_bytes(const struct llama_context * ctx);

}

// Expert weights that stay in the model's file, with a bounded number of them in memory.
//
//   step    a layer with experts, counted from 0 in the order of the graph
//   pool    the experts that a step chooses from; steps may share a pool
//   part    one weight matrix of an expert: gate, up or down
//   slot    memory for one expert, of whatever pool
//
// A graph names the experts of a step twice. announce(), as soon as the router has chosen them, starts reading what is
// missing. acquire(), right before they are used, waits for the rest and tells which slots they are in: the matrix
// products then index slots in place of experts, in a tensor with one matrix a slot, and are otherwise what they would
// be with all weights in memory. Weights are laid out on arrival as the backend's kernels want them ("settled").
//
// Reading is done by threads of the store's own, settling by the threads that compute, which would otherwise wait:
// more threads that compute than processors would slow each other in the barriers between operations.

class llama_expert_store {
public:
    struct part {
        ggml_type type;
        int64_t   ne0, ne1; // of one expert's matrix
        uint32_t  file;     // index into params::files
        uint64_t  offset;   // of expert 0; the others follow
    };

    struct buffer {
        void * data;
        size_t size;
    };

    // reads `n` bytes at most from `offset` on into `buffers` one after the other; returns their number, or -errno
    using reader = std::function<int64_t(int fd, const buffer * buffers, size_t n_buffers, uint64_t offset)>;

    struct params {
        std::vector<int>               files; // descriptors; duplicated
        std::vector<std::vector<part>> pools;
        std::vector<int>               steps; // the pool of each step
        int      n_expert  = 0;               // in a pool
        uint64_t max_bytes = 0;               // of memory for slots
        int      min_slots = 2;               // experts that are used at once, at least
        int      n_threads = 0;               // that read; 0: N_THREADS
        bool     direct_io = true;            // past the page cache, where the file system can
        bool     use_extra_bufts = true;      // lay weights out for the fastest kernels
        reader   read;                        // for tests; default: preadv
    };

    static constexpr int N_THREADS = 4; // one is slower, 8 are no faster: scripts/benchmarks/README.md

    // throws std::runtime_error: the memory holds fewer than min_slots experts, or a file cannot be used
    explicit llama_expert_store(const params & p);
    ~llama_expert_store();

    llama_expert_store(const llama_expert_store &) = delete;
    llama_expert_store & operator=(const llama_expert_store &) = delete;

    // [ne0, ne1, n_slots of memory reserved], a slot apart: what the matrix products read
    ggml_tensor * weights(int pool, int part) const;

    // slots that may be in use; more are reserved than used after a resize() to less
    int      n_slots()    const;
    int      n_reserved() const { return (int) slots.size(); }
    uint64_t slot_bytes() const { return stride; }

    // by expert of the step's pool: whether it is in memory, or on its way there
    std::vector<bool> holds(int step) const;

    // use `bytes` of memory at most, up to params::max_bytes. Waits for experts in use. Returns false, and changes
    // nothing, if that is less than min_slots
    bool resize(uint64_t bytes, int min_slots = 2);

    llama_expert_store_stats stats() const;

    // The experts one graph has asked for. Runs of other graphs may go on at the same time, each within itself in
    // order: begin(), then announce() and acquire() by step, then end().
    class run {
    public:
        explicit run(llama_expert_store & store) : store(store) {}
        ~run() { end(); }

        void begin();

        // called by one thread; `ids` may name experts repeatedly
        void announce(int step, const std::vector<int32_t> & ids);

        // called by one thread; returns the slots of `ids`, in their order, once the experts are there. After a failure
        // they are 0, and end() returns the reason
        std::vector<int32_t> acquire(int step, const std::vector<int32_t> & ids);

        // called by the other threads that compute, at the same time; helps and returns when acquire() does
        void assist(int step);

        // lets go of all experts; returns why the results are worthless, or an empty string
        std::string end();

    private:
        friend class llama_expert_store;

        struct mark { // of a slot that was announced
            int      step;
            int      slot;
            uint64_t load;
        };

        llama_expert_store & store;

        std::vector<int>  held;       // slots in use by the current step
        std::vector<mark> wanted;     // slots announced for steps to come
        std::vector<std::pair<int, std::vector<int>>> behind; // by step, experts announced that had no slot
        int               granted = -1; // the step whose slots are held
        std::atomic<int>  done { -1 };  // the step whose experts are there, or will never be
        std::string       error;

        void settle_until_done(std::unique_lock<std::mutex> & lock);
    };

private:
    static constexpr size_t PAGE      = 4096;    // alignment that direct reads need, at most
    static constexpr size_t MAX_PARTS = 4;
    static constexpr size_t MAX_MERGE = 8 << 20; // bytes of adjacent experts that are read at once

    struct file;

    struct slot {
        int      pool    = -1; // -1: empty
        int      expert  = -1;
        uint64_t load    = 0;  // counts what was loaded into the slot
        int      pins    = 0;  // runs that use it now
        int      wants   = 0;  // runs that will use it next
        bool     used    = false;
        bool     failed  = false;
        int      reading = 0;  // parts on their way from the file
        int      settling = 0; // parts being laid out
        uint32_t raw     = 0;  // parts to lay out, a bit each
        uint32_t shift[MAX_PARTS] = {}; // where in the slot a raw part starts

        bool is_ready() const { return reading == 0 && settling == 0 && raw == 0; }
        bool is_busy()  const { return reading != 0 || settling != 0; }
        bool can_go()   const { return pool >= 0 && !failed && pins == 0 && !is_busy(); }
    };

    struct job { // read one part of adjacent experts
        int pool, part, expert;
        std::vector<int> slots;
    };

    struct pool {
        std::vector<part>          parts;
        std::vector<size_t>        offset;  // of a part in a slot
        std::vector<ggml_tensor *> weights;
        std::vector<int>           slot_of; // -1: not in memory
        std::vector<bool>          seen;    // used since the pool's last visit began
        std::vector<float>         freq;    // recent visits that used the expert, older ones counting less
        std::vector<float>         worth;   // what keeping it is worth, from freq
    };

    char * region(int pool, int part, int slot) const;
    size_t slice(const part & p) const;

    // all with the mutex locked
    int  take   (int step, bool from_others);
    std::vector<int> load(int step, const std::vector<int> & experts, bool is_urgent);
    void queue  (int pool, const std::vector<int> & experts, const std::vector<int> & slots, bool is_urgent);
    void clear  (int i);
    void recycle(int i);
    void unpin  (run & r);
    void unwant (run & r, int last_step);
    void visit  (int step, const std::vector<int> & experts);
    bool settle_one(std::unique_lock<std::mutex> & lock, int i);
    void settle(int pool, int part, int i, size_t shift);
    void read_loop();
    std::string read(const job & j, std::vector<uint32_t> & shift);

    std::vector<int> experts_of(const std::vector<int32_t> & ids) const;

    std::vector<std::unique_ptr<file>> files;
    std::vector<pool>               pools;
    std::vector<int>                steps;
    std::vector<std::vector<float>> until; // [step][pool]: how far off the pool's next visit is, as a share of all steps
    reader                          read_file;

    ggml_context_ptr                       ctx;
    std::vector<ggml_backend_buffer_ptr>   homes; // one a buffer type; give the tensors their type, not their memory
    std::unique_ptr<char, std::function<void(char *)>> arena;
    size_t stride = 0; // of a slot

    mutable std::mutex      mutex;
    std::condition_variable changed; // a part arrived or settled, or slots became free
    std::condition_variable queued;
    std::vector<slot>       slots;
    int                     limit = 0; // slots that may be used
    std::vector<int>        empty;     // below limit
    std::deque<job>         jobs;
    std::string             read_error;
    bool                    stop = false;
    llama_expert_store_stats counts = {};
    std::vector<std::thread> threads;
};
