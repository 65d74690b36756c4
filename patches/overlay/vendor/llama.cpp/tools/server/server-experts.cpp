#include "server-experts.h"

#include "src/llama-expert-counts.h"
#include "src/llama-expert-store.h"

#include <cinttypes>
#include <cstdio>
#include <vector>

#if defined(__linux__)
#include <unistd.h>
#endif

// in bytes; 0 where it is not known
static uint64_t resident_memory() {
    uint64_t pages = 0;
#if defined(__linux__)
    if (FILE * file = fopen("/proc/self/statm", "r")) {
        if (fscanf(file, "%*u %" SCNu64, &pages) != 1) {
            pages = 0;
        }
        fclose(file);
    }
    pages *= sysconf(_SC_PAGESIZE);
#endif
    return pages;
}

json server_experts_json(const llama_model * model) {
    json layers = json::array();
    json pools  = json::array();
    json used   = json::array();

    std::vector<uint64_t> counts;
    uint32_t n_expert = 0;
    for (int il = 0; il < llama_model_n_layer(model); ++il) {
        int32_t pool = -1;
        if (const uint32_t n = llama_model_expert_counts(model, il, nullptr, 0, &pool)) {
            n_expert = n;
            counts.resize(n);
            llama_model_expert_counts(model, il, counts.data(), n, &pool);
            layers.push_back(il);
            pools .push_back(pool);
            used  .push_back(counts);
        }
    }

    json store = nullptr;
    llama_expert_store_stats stats;
    if (llama_model_expert_store_stats(model, &stats)) {
        store = json {
            {"hits",       stats.hits},
            {"misses",     stats.misses},
            {"wasted",     stats.wasted},
            {"bytes_read", stats.bytes_read},
            {"reads",      stats.reads},
            {"wait_us",    stats.wait_us},
            {"settle_us",  stats.settle_us},
            {"slots",      stats.n_slots},
            {"slot_bytes", stats.slot_bytes},
            {"experts",    stats.n_experts},
        };
    }

    return json {
        {"layers",         layers},
        {"pools",          pools},
        {"n_expert",       n_expert},
        {"used",           used},
        {"store",          store},
        {"resident_bytes", resident_memory()},
    };
}

std::string server_experts_metrics(const llama_model * model) {
    std::string text;
    const auto add = [&](const char * type, const char * name, const char * help, double value) {
        text += string_format("# HELP llamacpp:%s %s\n# TYPE llamacpp:%s %s\nllamacpp:%s %.17g\n",
                name, help, name, type, name, value);
    };

    add("gauge", "resident_memory_bytes", "Memory of the process", (double) resident_memory());

    llama_expert_store_stats stats;
    if (llama_model_expert_store_stats(model, &stats)) {
        add("counter", "expert_hits_total",           "Experts used that were in memory",         (double) stats.hits);
        add("counter", "expert_misses_total",         "Experts used that had to be read",         (double) stats.misses);
        add("counter", "expert_wasted_total",         "Experts read and dropped before their use", (double) stats.wasted);
        add("counter", "expert_bytes_read_total",     "Bytes of experts read",                    (double) stats.bytes_read);
        add("counter", "expert_reads_total",          "Requests to the file system for experts",  (double) stats.reads);
        add("counter", "expert_wait_seconds_total",   "Time that computing stood still for experts", stats.wait_us/1e6);
        add("counter", "expert_settle_seconds_total", "Time threads spent laying experts out",    stats.settle_us/1e6);
        add("gauge",   "expert_slots",                "Experts that memory holds",                (double) stats.n_slots);
        add("gauge",   "experts",                     "Experts in the model's file",              (double) stats.n_experts);
    }
    return text;
}
