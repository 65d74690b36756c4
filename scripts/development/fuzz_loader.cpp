// Gives llama.cpp whatever bytes there are as a model, and uses what loads. Nothing may end the process.
//
// With -fsanitize=fuzzer it is a libFuzzer target; with -DFUZZ_MAIN, a program of its own:
//
//   fuzz_loader SEED RUNS FILE...     runs every file, then RUNS random changes of them
//
// which leaves the last input in ./last-input.gguf.

#include "llama.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

using bytes = std::vector<uint8_t>;

// where an input lies for the loader, which wants a path
static int         g_file = -1;
static std::string g_path;

static void place(int file) {
    g_file = file;
    g_path = "/proc/self/fd/" + std::to_string(file);
    setenv("GGML_NO_BACKTRACE", "1", 1);
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    llama_backend_init();
}

// what our own programs do with a loaded model, a little of each
static void use(llama_model * model, bool with_context) {
    const llama_vocab * vocab = llama_model_get_vocab(model);

    char text[256];
    for (int i = 0; i < llama_model_meta_count(model); ++i) {
        llama_model_meta_key_by_index(model, i, text, sizeof(text));
        llama_model_meta_val_str_by_index(model, i, text, sizeof(text));
    }
    llama_model_desc(model, text, sizeof(text));
    llama_model_chat_template(model, nullptr);

    static const std::string prompt = "Don't  12345\n\n <|role_start|>user<|role_end|>\xe4\xb8\xad\xff ";
    llama_token tokens[64];
    int n_tokens = llama_tokenize(vocab, prompt.data(), prompt.size(), tokens, 64, true, true);
    llama_detokenize(vocab, tokens, std::max(n_tokens, 0), text, sizeof(text), false, true);
    for (llama_token id : { llama_vocab_bos(vocab), llama_vocab_eos(vocab), llama_vocab_nl(vocab) }) {
        if (id != LLAMA_TOKEN_NULL) {
            llama_vocab_get_text(vocab, id);
            llama_token_to_piece(vocab, id, text, sizeof(text), 0, true);
        }
    }

    if (!with_context) {
        return;
    }
    llama_context_params params = llama_context_default_params();
    params.n_ctx     = 32;
    params.n_batch   = 8;
    params.n_ubatch  = 8;
    params.n_threads = params.n_threads_batch = 1;
    llama_context * ctx = llama_init_from_model(model, params);
    if (ctx == nullptr) {
        return;
    }
    n_tokens = std::clamp(n_tokens, 0, 7);
    tokens[n_tokens++] = std::max(llama_vocab_n_tokens(vocab) - 1, 0);
    if (llama_decode(ctx, llama_batch_get_one(tokens, n_tokens)) == 0) {
        llama_get_logits_ith(ctx, -1);
    }
    llama_free(ctx);
}

static void run(const uint8_t * data, size_t size) {
    if (ftruncate(g_file, 0) || pwrite(g_file, data, size, 0) != (ssize_t) size) {
        std::perror("fuzz_loader");
        std::exit(1);
    }
    // how it is loaded is told by its size, so that an input says all there is to repeat it
    llama_model_kv_override cache[2] = {};
    std::strcpy(cache[0].key, "megrez-moe.expert_cache");
    cache[0].tag     = LLAMA_KV_OVERRIDE_TYPE_INT;
    cache[0].val_i64 = 1 << 20;

    llama_model_params params = llama_model_default_params();
    params.load_mode    = size % 4 == 1 ? LLAMA_LOAD_MODE_NONE : LLAMA_LOAD_MODE_MMAP;
    params.kv_overrides = size % 4 == 2 ? cache : nullptr;
    if (llama_model * model = llama_model_load_from_file(g_path.c_str(), params)) {
        use(model, size / 4 % 4 == 0);
        llama_model_free(model);
    }
}

//
// changes that keep the file readable, which random ones seldom do
//

namespace {

struct reader {
    const bytes & data;
    size_t at = 0;
    bool   ok = true;

    uint64_t take(size_t n) {
        uint64_t value = 0;
        if (!ok || n > data.size() - at) {
            ok = false;
            return 0;
        }
        std::memcpy(&value, data.data() + at, n);
        at += n;
        return value;
    }
    void skip(uint64_t n) {
        ok = ok && n <= data.size() - at;
        at += ok ? n : 0;
    }
};

struct span { // a field of the file
    size_t at, size;
    bool   is_text; // its length lies in the eight bytes before it
};

} // namespace

static size_t size_of(uint64_t type) {
    static const size_t sizes[] = { 1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8 };
    return type < std::size(sizes) ? sizes[type] : 0;
}

static void text(reader & in, std::vector<span> & out) {
    const uint64_t n = in.take(8);
    out.push_back({ in.at, (size_t) n, true });
    in.skip(n);
}

// keys, values, types, counts and the tensor table, as far as they can be read
static std::vector<span> fields(const bytes & data) {
    std::vector<span> out;
    reader in { data };
    const auto scalar = [&](size_t n) {
        out.push_back({ in.at, n, false });
        return in.take(n);
    };
    in.skip(8);
    const uint64_t n_tensors = scalar(8), n_values = scalar(8);
    for (uint64_t i = 0; in.ok && i < n_values; ++i) {
        text(in, out);
        uint64_t type = scalar(4), n = 1;
        if (type == 9) {
            type = scalar(4);
            n    = scalar(8);
        }
        for (uint64_t j = 0; in.ok && j < n; ++j) {
            if (type == 8) {
                text(in, out);
            } else if (size_of(type)) {
                scalar(size_of(type));
            } else {
                in.ok = false;
            }
        }
    }
    for (uint64_t i = 0; in.ok && i < n_tensors; ++i) {
        text(in, out);
        const uint64_t n_dims = scalar(4);
        for (uint64_t j = 0; in.ok && j < n_dims; ++j) {
            scalar(8);
        }
        scalar(4);
        scalar(8);
    }
    if (!in.ok && !out.empty()) {
        out.pop_back();
    }
    return out;
}

static void change_field(bytes & data, std::mt19937 & draw, size_t max_size) {
    auto all = fields(data);
    all.erase(std::remove_if(all.begin(), all.end(), [&](const span & s) {
        return s.size == 0 || s.at > data.size() || s.size > data.size() - s.at;
    }), all.end());
    if (all.empty()) {
        return;
    }
    // most fields are words; half of the changes go elsewhere
    const auto pick = [&] { return all[draw() % all.size()]; };
    span one = pick();
    for (int i = 0; i < 8 && one.is_text && draw() % 2; ++i) {
        one = pick();
    }
    uint8_t * at = data.data() + one.at;
    if (!one.is_text) {
        static const uint64_t strange[] = { 0, 1, 2, 3, 255, 256, 65535, 65536, 0x7f800000, 0x7fc00000, 0xbf800000,
            INT32_MAX, 1ull << 31, UINT32_MAX, 1ull << 32, INT64_MAX, 1ull << 63, UINT64_MAX };
        uint64_t value = 0;
        std::memcpy(&value, at, one.size);
        switch (draw() % 3) {
            case 0: value = strange[draw() % std::size(strange)]; break;
            case 1: value += draw() % 2 ? 1 : -1;                 break;
            case 2: value ^= 1ull << draw() % (8*one.size);       break;
        }
        std::memcpy(at, &value, one.size);
        return;
    }
    const span other = pick();
    const bytes source(data.begin() + other.at, data.begin() + other.at + other.size);
    switch (draw() % 3) {
        case 0: at[draw() % one.size] ^= 1 << draw() % 8; break;
        case 1: // another field's content, of whatever length
            if (data.size() - one.size + source.size() <= max_size) {
                const uint64_t n = source.size();
                std::memcpy(at - 8, &n, 8);
                data.erase(data.begin() + one.at, data.begin() + one.at + one.size);
                data.insert(data.begin() + one.at, source.begin(), source.end());
            }
            break;
        case 2: std::memcpy(at, source.data(), std::min(one.size, source.size())); break;
    }
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    run(data, size);
    return 0;
}

#ifdef FUZZ_MAIN

static bytes read_all(const char * path) {
    std::ifstream in(path, std::ios::binary);
    return bytes(std::istreambuf_iterator<char>(in), {});
}

int main(int argc, char ** argv) {
    if (argc < 4) {
        std::fprintf(stderr, "usage: %s SEED RUNS FILE...\n", argv[0]);
        return 2;
    }
    place(open("last-input.gguf", O_RDWR | O_CREAT, 0644));
    std::vector<bytes> files;
    for (int i = 3; i < argc; ++i) {
        files.push_back(read_all(argv[i]));
        run(files.back().data(), files.back().size());
    }
    std::mt19937 draw(std::atoi(argv[1]));
    const long n = std::atol(argv[2]);
    for (long i = 0; i < n; ++i) {
        bytes data = files[draw() % files.size()];
        for (int j = draw() % 3; j >= 0; --j) {
            if (draw() % 4 || data.empty()) {
                change_field(data, draw, SIZE_MAX);
            } else {
                data[draw() % data.size()] = draw();
            }
        }
        if (draw() % 16 == 0) {
            data.resize(draw() % (data.size() + 1));
        }
        run(data.data(), data.size());
    }
    std::printf("%ld files and %ld changes of them: alive\n", (long) files.size(), n);
    return 0;
}

#else

extern "C" size_t LLVMFuzzerMutate(uint8_t * data, size_t size, size_t max_size);

extern "C" int LLVMFuzzerInitialize(int *, char ***) {
    place(memfd_create("input", 0));
    return 0;
}

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t * data, size_t size, size_t max_size, unsigned seed) {
    std::mt19937 draw(seed);
    if (draw() % 4 == 0) {
        return LLVMFuzzerMutate(data, size, max_size);
    }
    bytes changed(data, data + size);
    for (int i = draw() % 3; i >= 0; --i) {
        change_field(changed, draw, max_size);
    }
    std::copy(changed.begin(), changed.end(), data);
    return changed.size();
}

#endif
