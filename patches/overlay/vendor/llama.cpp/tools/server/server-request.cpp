#include "server-request.h"

#include <cmath>
#include <cstdint>
#include <set>
#include <stdexcept>
#include <string>

namespace {

[[noreturn]] void refuse(const std::string & what, const std::string & expected) {
    throw std::invalid_argument("'" + what + "': expected " + expected);
}

[[noreturn]] void refuse(const std::string & what, const std::string & expected, const json & found) {
    std::string text = safe_json_to_str(found);
    if (text.size() > 80) {
        text.resize(77);
        text.resize(validate_utf8(text)); // no half of a character
        text += "...";
    }
    refuse(what, expected + ", got " + text);
}

bool has(const json & body, const std::string & name) {
    return body.contains(name) && !body.at(name).is_null();
}

struct number {
    const char * name;
    double       min, max;
    bool         is_integer;
};

const double MAX_INT = INT32_MAX;

const number NUMBERS[] = {
    { "temperature",           0.0,      1e6,     false },
    { "top_p",                 0.0,      1.0,     false },
    { "min_p",                 0.0,      1.0,     false },
    { "presence_penalty",     -2.0,      2.0,     false },
    { "frequency_penalty",    -2.0,      2.0,     false },
    { "top_k",                -1.0,      MAX_INT, true  },
    { "max_tokens",           -1.0,      MAX_INT, true  },
    { "max_completion_tokens", 1.0,      MAX_INT, true  },
    { "max_output_tokens",     1.0,      MAX_INT, true  },
    { "n",                     1.0,      MAX_INT, true  },
    { "best_of",               1.0,      1.0,     true  },
    { "top_logprobs",          0.0,      1000.0,  true  },
    { "seed",                 -1.0,      4294967295.0, true },
};

void check_numbers(const json & body) {
    for (const auto & p : NUMBERS) {
        if (!has(body, p.name)) {
            continue;
        }
        const json & value = body.at(p.name);
        const double x     = value.is_number() ? value.get<double>() : NAN;
        const bool   fits  = x >= p.min && x <= p.max && (!p.is_integer || x == std::floor(x));
        const std::string range = p.max >= MAX_INT ? string_format("of at least %g", p.min)
                                                   : string_format("from %g to %g", p.min, p.max);
        if (!fits) {
            refuse(p.name, (p.is_integer ? "an integer " : "a number ") + range, value);
        }
    }
    for (const char * name : { "max_tokens", "max_completion_tokens" }) {
        if (has(body, name) && body.at(name).get<double>() == 0) {
            refuse(name, "at least 1: no answer is shorter than a token", body.at(name));
        }
    }
}

void check_stop(const json & body) {
    if (!has(body, "stop")) {
        return;
    }
    const json & stop = body.at("stop");
    const auto is_text = [](const json & s) { return s.is_string() && !s.get<std::string>().empty(); };
    bool fits = stop.is_array() || is_text(stop);
    for (size_t i = 0; stop.is_array() && i < stop.size(); ++i) {
        fits = fits && is_text(stop.at(i));
    }
    if (!fits) {
        refuse("stop", "a text or a list of texts, none of them empty", stop);
    }
}

void check_logit_bias(const json & body, int32_t n_vocab) {
    if (!has(body, "logit_bias") || body.at("logit_bias").is_array()) { // llama.cpp's own form
        return;
    }
    const json & bias = body.at("logit_bias");
    if (!bias.is_object()) {
        refuse("logit_bias", "an object of token ids and numbers", bias);
    }
    for (const auto & item : bias.items()) {
        const std::string & key = item.key();
        const bool is_id = !key.empty() && key.size() < 10 && key.find_first_not_of("0123456789") == std::string::npos &&
            std::stol(key) < n_vocab;
        if (!is_id || !(item.value().is_number() || item.value().is_boolean())) {
            refuse("logit_bias", string_format("an object of token ids below %d and numbers", n_vocab), bias);
        }
    }
}

void check_common(const json & body, int32_t n_vocab) {
    if (!body.is_object()) {
        throw std::invalid_argument("expected a JSON object as the body of the request");
    }
    check_numbers(body);
    check_stop(body);
    check_logit_bias(body, n_vocab);
    if (has(body, "model") && !body.at("model").is_string()) {
        refuse("model", "a name", body.at("model"));
    }
    if (has(body, "stream") && !body.at("stream").is_boolean()) {
        refuse("stream", "true or false", body.at("stream"));
    }
}

void check_part(const std::string & where, const json & part) {
    const std::string type = part.is_object() ? json_value(part, "type", std::string()) : "";
    if (type == "text" || type == "input_text" || type == "output_text" || type == "refusal") {
        const std::string field = type == "refusal" ? type : "text";
        if (!part.contains(field) || !part.at(field).is_string()) {
            refuse(where + "." + field, "a text", part);
        }
    } else if (type == "image_url" || type == "input_image" || type == "input_audio" || type == "input_video" || type == "file") {
        refuse(where, "text: this model reads nothing else, and got a part of type '" + type + "'");
    } else {
        refuse(where, "an object with \"type\": \"text\"", part);
    }
}

void check_messages(json & body) {
    if (!has(body, "messages") || !body.at("messages").is_array() || body.at("messages").empty()) {
        refuse("messages", "a list of at least one message");
    }
    static const std::set<std::string> roles = { "system", "developer", "user", "assistant", "tool" };

    json & messages = body.at("messages");
    for (size_t i = 0; i < messages.size(); ++i) {
        json & message = messages.at(i);
        const std::string where = "messages[" + std::to_string(i) + "]";
        if (!message.is_object()) {
            refuse(where, "an object", message);
        }
        const bool has_role = message.contains("role") && message.at("role").is_string();
        const std::string role = has_role ? message.at("role").get<std::string>() : "";
        if (!roles.count(role)) {
            refuse(where + ".role", "one of system, developer, user, assistant, tool", has_role ? message.at("role") : json());
        }
        if (role == "developer") {
            message["role"] = "system";
        }
        if (!has(message, "content")) {
            // none beside calls of tools; and an assistant's answer may be empty
            if (role != "assistant") {
                refuse(where + ".content", "a text or a list of parts");
            }
            continue;
        }
        const json & content = message.at("content");
        if (content.is_array()) {
            for (size_t j = 0; j < content.size(); ++j) {
                check_part(where + ".content[" + std::to_string(j) + "]", content.at(j));
            }
        } else if (!content.is_string()) {
            refuse(where + ".content", "a text or a list of parts", content);
        }
    }
}

void check_tools(const json & body) {
    std::set<std::string> names;
    if (has(body, "tools")) {
        const json & tools = body.at("tools");
        if (!tools.is_array()) {
            refuse("tools", "a list", tools);
        }
        for (size_t i = 0; i < tools.size(); ++i) {
            const std::string where = "tools[" + std::to_string(i) + "]";
            const json & tool = tools.at(i);
            const bool is_function = tool.is_object() && json_value(tool, "type", std::string()) == "function" &&
                has(tool, "function") && tool.at("function").is_object();
            if (!is_function) {
                refuse(where, "an object with \"type\": \"function\" and \"function\": {...}", tool);
            }
            const json & function = tool.at("function");
            if (!has(function, "name") || !function.at("name").is_string() || function.at("name").get<std::string>().empty()) {
                refuse(where + ".function.name", "a name", function);
            }
            if (has(function, "parameters") && !function.at("parameters").is_object()) {
                refuse(where + ".function.parameters", "a JSON schema", function.at("parameters"));
            }
            names.insert(function.at("name").get<std::string>());
        }
    }
    if (!has(body, "tool_choice")) {
        return;
    }
    const json & choice = body.at("tool_choice");
    if (choice.is_string()) {
        const std::string text = choice.get<std::string>();
        if (text != "auto" && text != "none" && text != "required") {
            refuse("tool_choice", "auto, none, required or a function", choice);
        }
        if (text == "required" && names.empty()) {
            refuse("tools", "at least one, since tool_choice is required");
        }
        return;
    }
    const bool is_function = choice.is_object() && has(choice, "function") && choice.at("function").is_object();
    if (!is_function) {
        refuse("tool_choice", "auto, none, required or a function", choice);
    }
    if (!names.count(json_value(choice.at("function"), "name", std::string()))) {
        refuse("tool_choice", "one of the functions in tools", choice);
    }
}

void check_response_format(const json & body) {
    if (!has(body, "response_format")) {
        return;
    }
    const json & format = body.at("response_format");
    const std::string type = format.is_object() ? json_value(format, "type", std::string()) : "";
    if (type != "text" && type != "json_object" && type != "json_schema") {
        refuse("response_format", "an object with a type of text, json_object or json_schema", format);
    }
    if (type == "json_schema") {
        const json & wrapper = has(format, "json_schema") ? format.at("json_schema") : format;
        if (!wrapper.is_object() || !has(wrapper, "schema") || !wrapper.at("schema").is_object()) {
            refuse("response_format.json_schema.schema", "a JSON schema");
        }
    }
    if (type != "text" && has(body, "grammar")) {
        refuse("grammar", "none beside a response_format: an answer follows one of them");
    }
}

// whether `name` is absent or one of these
void check_type(const json & body, const char * name, bool fits, const char * expected) {
    if (has(body, name) && !fits) {
        refuse(name, expected, body.at(name));
    }
}

void check_object(const json & body, const char * name) {
    check_type(body, name, body.value(name, json()).is_object(), "an object");
}

// the elements of the list `name`, which may be a text instead or absent, are objects
void check_objects(const json & body, const char * name) {
    const json list = body.value(name, json());
    check_type(body, name, list.is_array() || list.is_string(), "a text or a list of objects");
    for (size_t i = 0; list.is_array() && i < list.size(); ++i) {
        if (!list.at(i).is_object()) {
            refuse(std::string(name) + "[" + std::to_string(i) + "]", "an object", list.at(i));
        }
    }
}

// each turn of a conversation has a list of parts, or a text, as its `content`
template <typename F>
void check_turns(const json & body, const char * name, F check_turn) {
    check_objects(body, name);
    const json turns = body.value(name, json());
    for (size_t i = 0; turns.is_array() && i < turns.size(); ++i) {
        const std::string where = std::string(name) + "[" + std::to_string(i) + "]";
        check_turn(where, turns.at(i));
        const json content = turns.at(i).value("content", json());
        for (size_t j = 0; content.is_array() && j < content.size(); ++j) {
            if (!content.at(j).is_object()) {
                refuse(where + ".content[" + std::to_string(j) + "]", "an object", content.at(j));
            }
        }
    }
    if (turns.empty()) {
        refuse(name, "at least one message");
    }
}

void check_role(const std::string & where, const json & turn, const std::set<std::string> & roles) {
    if (!turn.value("role", json()).is_string() || !roles.count(turn.at("role"))) {
        refuse(where + ".role", "one of " + string_join({ roles.begin(), roles.end() }, ", "), turn.value("role", json()));
    }
    const json content = turn.value("content", json());
    if (!content.is_string() && !content.is_array()) {
        refuse(where + ".content", "a text or a list of parts", content);
    }
}

} // namespace

void server_check_chat_request(json & body, int32_t n_vocab) {
    check_common(body, n_vocab);
    check_messages(body);
    check_tools(body);
    check_response_format(body);
    if (has(body, "chat_template")) {
        refuse("chat_template", "none: the template is the model's");
    }
}

void server_check_completion_request(const json & body, int32_t n_vocab) {
    check_common(body, n_vocab);
    if (!has(body, "prompt")) {
        refuse("prompt", "a text, a list of texts or of token ids");
    }
    if (has(body, "suffix")) {
        refuse("suffix", "none: this model does not fill in");
    }
    if (json_value(body, "echo", false)) {
        refuse("echo", "false: the probabilities of a prompt are not computed");
    }
}

void server_check_responses_request(const json & body) {
    if (!body.is_object()) {
        throw std::invalid_argument("expected a JSON object as the body of the request");
    }
    check_numbers(body);
    check_type(body, "instructions", body.value("instructions", json()).is_string(), "a text");
    check_object(body, "text");
    check_object(body, "reasoning");
    check_objects(body, "tools");
    check_turns(body, "input", [](const std::string & where, const json & item) {
        if (!item.contains("type") || item.at("type") == "message") {
            check_role(where, item, { "assistant", "developer", "system", "user" });
        }
    });
}

void server_check_anthropic_request(const json & body) {
    if (!body.is_object()) {
        throw std::invalid_argument("expected a JSON object as the body of the request");
    }
    check_numbers(body);
    check_objects(body, "system");
    check_object(body, "tool_choice");
    const json tools = body.value("tools", json());
    check_type(body, "tools", tools.is_array(), "a list of objects");
    check_objects(body, "tools");
    check_turns(body, "messages", [](const std::string & where, const json & message) {
        check_role(where, message, { "assistant", "user" });
        for (const json & part : message.at("content").is_array() ? message.at("content") : json::array()) {
            const std::string type = part.is_object() ? json_value(part, "type", std::string()) : "";
            if (type == "image" || type == "document") {
                refuse(where, "text: this model reads nothing else, and got a part of type '" + type + "'");
            }
        }
    });
}
