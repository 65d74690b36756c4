#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#if !defined(_WIN32)
#include <sys/resource.h>
#endif

// How many threads compute a token where other programs want the processors, too. Each of a token's hundreds of steps
// ends when the slowest thread is done, and a thread that shares its processor is away for milliseconds at a time: one
// thread fewer can be twice as fast. Where threads lose their processors, one fewer is tried for a few tokens, and kept if
// that was faster; later one more again, as the other program may be gone. What is computed is the same.
class llama_thread_count {
public:
    static constexpr size_t N_WINDOW = 4;  // tokens between two decisions
    static constexpr size_t N_TRIAL  = 2;  // tokens of a trial; the slower one counts
    static constexpr size_t MIN_WAIT = 4;  // windows after a trial that was kept; after each that was not, twice as many
    static constexpr size_t MAX_WAIT = 32;

    // threads for the next token; `n_max` are asked for
    int next(int n_max) {
        if (n_max != max) {
            *this = llama_thread_count();
            max = n = n_max;
        }
        return n + step;
    }

    // how long it took, and how many times the process's threads had to leave a processor meanwhile
    void computed(double seconds, int64_t n_preempted) {
        times.push_back(seconds);
        preempted += n_preempted;
        if (times.size() < (step ? N_TRIAL : N_WINDOW)) {
            return;
        }
        std::nth_element(times.begin(), times.begin() + times.size()/2, times.end());
        const double median = times[times.size()/2];
        if (step) {
            const bool better = median < 0.95*usual;
            n       += better ? step : 0;
            wait     = better ? MIN_WAIT : std::min(2*wait, MAX_WAIT);
            step     = 0;
            n_window = 0;
        } else {
            usual = median;
            if (++n_window >= wait) {
                const bool busy = preempted >= (int64_t) N_WINDOW;
                step = busy && n > 1 ? -1 : n < max ? 1 : 0;
            }
        }
        times.clear();
        preempted = 0;
    }

    // of this process so far
    static int64_t preemptions() {
#if !defined(_WIN32)
        rusage usage;
        if (getrusage(RUSAGE_SELF, &usage) == 0) {
            return usage.ru_nivcsw;
        }
#endif
        return 0;
    }

private:
    int     max       = 0;
    int     n         = 0;
    int     step      = 0; // of a trial
    int64_t preempted = 0;
    double  usual     = 0;
    size_t  n_window  = 0; // since the last trial
    size_t  wait      = 1;

    std::vector<double> times;
};
