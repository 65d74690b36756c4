// llama_thread_count on a made-up machine: alone, beside another program, and alone again.

#include "../src/llama-thread-count.h"

#include <cstdio>
#include <random>

static bool ok = true;

static void expect(bool condition, const char * what) {
    if (!condition) {
        printf("FAILED: %s\n", what);
        ok = false;
    }
}

struct machine {
    int  n_cpus;
    int  n_others = 0; // programs that compute beside this one
    std::mt19937 rng{1};

    // seconds and preemptions of a token
    std::pair<double, int64_t> token(int n) {
        const double noise   = 1 + (rng() % 100)/1000.0;
        const bool   crowded = n + n_others > n_cpus;
        return { noise*(1.0/n + (crowded ? 0.8 : 0)), crowded ? 20 : rng() % 20 == 0 };
    }
};

// the share of tokens that `wanted` threads computed, and the time of all
static std::pair<double, double> run(llama_thread_count & count, machine & m, int n_max, int n_tokens, int wanted) {
    int    n    = 0;
    double time = 0;
    for (int i = 0; i < n_tokens; ++i) {
        const int threads = count.next(n_max);
        expect(threads >= 1 && threads <= n_max, "a number of threads nobody asked for");
        const auto [seconds, preempted] = m.token(threads);
        count.computed(seconds, preempted);
        n    += threads == wanted;
        time += seconds;
    }
    return { (double) n/n_tokens, time };
}

int main() {
    for (const int n_cpus : { 2, 4, 16 }) {
        llama_thread_count count;
        machine m{n_cpus};
        expect(run(count, m, n_cpus, 1000, n_cpus).first == 1, "alone, all threads compute every token");

        m.n_others = 1;
        run(count, m, n_cpus, 24, 0);
        expect(run(count, m, n_cpus, 1000, n_cpus - 1).first > 0.93, "beside one program, one thread fewer");

        m.n_others = 0;
        run(count, m, n_cpus, 200, 0);
        expect(run(count, m, n_cpus, 1000, n_cpus).first > 0.98, "alone again, all of them");
    }
    {
        llama_thread_count count; // other programs on all processors: no number of threads helps
        machine m{2, 2};
        double usual = 0;
        for (int i = 0; i < 1000; ++i) {
            usual += m.token(2).first;
        }
        expect(run(count, m, 2, 1000, 2).second < 1.1*usual, "trials that fail cost little");
    }
    {
        llama_thread_count count;
        machine m{4, 1};
        run(count, m, 4, 100, 0);
        expect(count.next(2) == 2, "another number of threads begins anew");
        machine one{1, 1};
        expect(run(count, one, 1, 100, 1).first == 1, "one thread stays one");
    }
    printf("%s\n", ok ? "OK" : "FAILED");
    return ok ? 0 : 1;
}
