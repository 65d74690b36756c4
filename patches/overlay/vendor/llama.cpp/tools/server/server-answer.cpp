#include "server-answer.h"

#include <algorithm>
#include <ctime>
#include <utility>

json server_sum_usage(const std::map<size_t, json> & usages, size_t n) {
    json sum = usages.begin()->second;
    int64_t n_prompt = 0;
    int64_t n_cached = 0;
    int64_t n_output = 0;
    for (const auto & [index, usage] : usages) {
        if (index % n == 0) {
            n_prompt += usage.at("prompt_tokens").get<int64_t>();
            n_cached += usage.at("prompt_tokens_details").at("cached_tokens").get<int64_t>();
        }
        n_output += usage.at("completion_tokens").get<int64_t>();
    }
    sum["prompt_tokens"]     = n_prompt;
    sum["completion_tokens"] = n_output;
    sum["total_tokens"]      = n_prompt + n_output;
    sum["prompt_tokens_details"]["cached_tokens"] = n_cached;
    return sum;
}

static std::string bytes_of(const json & token) {
    std::string text;
    for (const json & byte : token.at("bytes")) {
        text += (char) byte.get<int>();
    }
    return text;
}

// a token as a text, which part of a character cannot be
static std::string token_name(const std::string & bytes) {
    if (validate_utf8(bytes) == bytes.size()) {
        return bytes;
    }
    std::string name = "bytes:";
    for (const char byte : bytes) {
        name += string_format("\\x%02x", (uint8_t) byte);
    }
    return name;
}

void server_add_completion_logprobs(json & choice, size_t & n_chars) {
    json & logprobs = choice.at("logprobs");
    if (logprobs.is_null()) {
        return;
    }
    json tokens  = json::array();
    json values  = json::array();
    json tops    = json::array();
    json offsets = json::array();
    for (const json & token : logprobs.at("content")) {
        if (!token.contains("logprob")) {
            return; // llama.cpp's own: probabilities after sampling
        }
        const std::string bytes = bytes_of(token);
        tokens.push_back(token_name(bytes));
        values.push_back(token.at("logprob"));
        json top = json::object();
        for (const json & other : token.at("top_logprobs")) {
            top[token_name(bytes_of(other))] = other.at("logprob");
        }
        tops.push_back(std::move(top));
        offsets.push_back(n_chars);
        n_chars += std::count_if(bytes.begin(), bytes.end(), [](uint8_t byte) { return (byte & 0xc0) != 0x80; });
    }
    logprobs["tokens"]         = std::move(tokens);
    logprobs["token_logprobs"] = std::move(values);
    logprobs["top_logprobs"]   = std::move(tops);
    logprobs["text_offset"]    = std::move(offsets);
}

server_answer_stream::server_answer_stream(
        task_response_type type, std::string model, size_t n_choices, size_t n, bool include_usage)
    : type(type), model(std::move(model)), n_choices(n_choices), n(n), include_usage(include_usage) {
}

std::string server_answer_stream::format(json result) {
    if (result.is_null()) {
        return ""; // nothing but the headers is due
    }
    switch (type) {
        case TASK_RESPONSE_TYPE_ANTHROPIC:
            return format_anthropic_sse(result);
        case TASK_RESPONSE_TYPE_OAI_RESP:
            return format_oai_resp_sse(with_places(std::move(result)));
        case TASK_RESPONSE_TYPE_OAI_CMPL: {
            json & choice = result.at("choices").at(0);
            server_add_completion_logprobs(choice, n_chars[choice.at("index").get<size_t>()]);
            return format_oai_sse(with_usage(json::array({ std::move(result) })));
        }
        case TASK_RESPONSE_TYPE_OAI_CHAT:
            return format_oai_sse(with_usage(std::move(result)));
        default:
            return format_oai_sse(result);
    }
}

json server_answer_stream::with_usage(json chunks) {
    json out = json::array();
    size_t index = 0;
    for (json & chunk : chunks) {
        if (!chunk.at("choices").empty()) {
            index = chunk.at("choices").at(0).at("index").get<size_t>();
        }
        if (!chunk.contains("usage")) {
            out.push_back(std::move(chunk));
            continue;
        }
        usages[index] = std::move(chunk.at("usage"));
        chunk.erase("usage");
        json last = chunk;
        if (!chunk.at("choices").empty()) {
            out.push_back(std::move(chunk));
        }
        if (usages.size() == n_choices && include_usage) {
            last["choices"] = json::array();
            last["usage"]   = server_sum_usage(usages, n);
            out.push_back(std::move(last));
        }
    }
    return out;
}

static void add_missing(json & object, const json & all) {
    for (const auto & field : all.items()) {
        if (!object.contains(field.key())) {
            object[field.key()] = field.value();
        }
    }
}

// an item that has only begun
static json begun(json item) {
    item["status"] = "in_progress";
    if (item.at("type") == "function_call") {
        item["arguments"] = "";
    } else {
        item["content"] = json::array();
    }
    return item;
}

json server_answer_stream::with_places(json events) {
    json out = json::array();
    const auto add = [&](const char * name, json data) {
        data["type"]            = name;
        data["sequence_number"] = n_events++;
        out.push_back({ { "event", name }, { "data", std::move(data) } });
    };
    const auto find = [&](const std::string & id) {
        return std::find_if(items.begin(), items.end(), [&](const item & i) { return i.id == id; }) - items.begin();
    };
    // what no event has told yet: some text is held back until the answer is done
    const auto add_begin = [&](const std::string & id, const json & item) {
        if (find(id) == (ptrdiff_t) items.size()) {
            add("response.output_item.added", { { "item", begun(item) }, { "output_index", items.size() } });
            items.push_back({ id, "" });
            return true;
        }
        return false;
    };
    const auto add_rest = [&](const char * name, json data, const std::string & whole) {
        std::string & sent = items.at(data.at("output_index").get<size_t>()).sent;
        if (whole.size() > sent.size() && whole.compare(0, sent.size(), sent) == 0) {
            data["delta"] = whole.substr(sent.size());
            add(name, std::move(data));
            sent = whole;
        }
    };

    for (json & event : events) {
        const std::string name = event.at("event").get<std::string>();
        json data = std::move(event.at("data"));

        if (data.contains("response")) {
            const json all = {
                { "created_at",         std::time(nullptr) },
                { "error",              nullptr },
                { "incomplete_details", nullptr },
                { "model",              model },
                { "output",             json::array() },
            };
            add_missing(data.at("response"), all);
        } else if (name == "response.output_item.added") {
            data["output_index"] = items.size();
            items.push_back({ data.at("item").at("id").get<std::string>(), "" });
        } else if (name == "response.output_item.done") {
            const json item = data.at("item"); // a copy: adding to `data` may move what it holds
            const std::string id = item.at("id").get<std::string>();
            add_begin(id, item);
            data["output_index"] = find(id);
            if (item.at("type") == "function_call") {
                json place = { { "item_id", id }, { "output_index", find(id) } };
                add_rest("response.function_call_arguments.delta", place, item.at("arguments").get<std::string>());
                place["name"]      = item.at("name");
                place["arguments"] = item.at("arguments");
                add("response.function_call_arguments.done", std::move(place));
            }
        } else { // of a part
            const std::string id = data.at("item_id").get<std::string>();
            json place = { { "item_id", id } };
            if (name != "response.function_call_arguments.delta") {
                place["content_index"] = 0;
            }
            if (name == "response.output_text.done") {
                const json message = { { "id", id }, { "type", "message" }, { "role", "assistant" } };
                const json part    = { { "type", "output_text" }, { "text", "" }, { "annotations", json::array() } };
                const bool is_new  = add_begin(id, message);
                place["output_index"] = find(id);
                if (is_new) {
                    json begin = place;
                    begin["part"] = part;
                    add("response.content_part.added", std::move(begin));
                }
                place["logprobs"] = json::array();
                add_rest("response.output_text.delta", place, data.at("text").get<std::string>());
            } else if (name == "response.output_text.delta") {
                place["logprobs"] = json::array();
            }
            place["output_index"] = find(id);
            add_missing(data, place);
            if (data.contains("delta")) {
                items.at(find(id)).sent += data.at("delta").get<std::string>();
            }
        }
        add(name.c_str(), std::move(data));
    }
    return out;
}
