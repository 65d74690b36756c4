#pragma once

#include "server-task.h"

#include <map>
#include <string>
#include <vector>

// What OpenAI's APIs say of an answer as a whole, where each result knows only itself.

// The usage of a request from those of its choices, by index; each `n` choices share a prompt, which counts once.
json server_sum_usage(const std::map<size_t, json> & usages, size_t n);

// The fields of /v1/completions beside the probabilities of /v1/chat/completions, which `choice` has. `n_chars` is how
// many characters of the choice came before; those of this one are added to it.
// https://platform.openai.com/docs/api-reference/completions/object
void server_add_completion_logprobs(json & choice, size_t & n_chars);

// Writes the events of one stream.
class server_answer_stream {
public:
    // `n_choices` are awaited, each `n` of them of one prompt
    server_answer_stream(task_response_type type, std::string model, size_t n_choices, size_t n, bool include_usage);

    // `result` as JSON, as server-sent events
    std::string format(json result);

private:
    // an item of a response's output
    struct item {
        std::string id;
        std::string sent; // its text or arguments, as far as deltas told them
    };

    task_response_type type;
    std::string model;
    size_t n_choices;
    size_t n;
    bool include_usage;

    std::map<size_t, json>   usages;  // of the choices that are done
    std::map<size_t, size_t> n_chars; // of each choice

    std::vector<item> items;
    int64_t n_events = 0;

    // one usage, behind the last choice
    json with_usage(json chunks);

    // /v1/responses: tells where each event belongs, and leaves out none
    json with_places(json events);
};
