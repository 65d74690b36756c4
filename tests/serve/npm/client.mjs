// What users of the AI SDK do. Prints what came of it as one JSON object.
//   BASE_URL=http://127.0.0.1:8000/v1 API_KEY=sk-... node client.mjs

import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, Output, streamText } from "ai";
import { z } from "zod";

const { BASE_URL: baseURL, API_KEY: apiKey } = process.env;
const question = "世界上最高的山峰是哪座？";
const settings = { temperature: 0, maxRetries: 0 };

function model(key = apiKey, name = "megrez-moe") {
  const options = { name: "megrez", baseURL, apiKey: key, supportsStructuredOutputs: true };
  return createOpenAICompatible({ ...options, includeUsage: true })(name);
}

async function whole() {
  const { text, usage, finishReason } = await generateText({
    ...settings, model: model(), prompt: question,
  });
  return { text, usage, finishReason };
}

async function streamed() {
  const result = streamText({ ...settings, model: model(), prompt: question });
  const pieces = [];
  for await (const piece of result.textStream) pieces.push(piece);
  return { pieces, usage: await result.usage, finishReason: await result.finishReason };
}

async function conversation() {
  const { text } = await generateText({
    ...settings,
    model: model(),
    system: "Be brief.",
    messages: [
      { role: "user", content: "hi" },
      { role: "assistant", content: "Hello!" },
      { role: "user", content: [{ type: "text", text: question }] },
    ],
  });
  return { text };
}

async function object() {
  const person = z.object({ name: z.string().max(10), age: z.number().int().min(0).max(150) });
  const { output } = await generateText({
    ...settings,
    model: model(),
    prompt: "Invent a person.",
    output: Output.object({ schema: person }),
    maxOutputTokens: 200,
  });
  return output;
}

async function stopped() {
  const controller = new AbortController();
  const result = streamText({
    ...settings, model: model(), prompt: question, abortSignal: controller.signal,
  });
  const pieces = [];
  try {
    for await (const piece of result.textStream) {
      pieces.push(piece);
      controller.abort();
    }
  } catch (error) {
    if (error.name !== "AbortError") throw error;
  }
  return { pieces };
}

async function refused(model, prompt = "hi") {
  try {
    await generateText({ ...settings, model, prompt });
    return {};
  } catch ({ name, statusCode, isRetryable, message }) {
    return { name, statusCode, isRetryable, message };
  }
}

console.log(JSON.stringify({
  whole: await whole(),
  streamed: await streamed(),
  conversation: await conversation(),
  object: await object(),
  stopped: await stopped(),
  wrongKey: await refused(model("sk-wrong")),
  wrongModel: await refused(model(apiKey, "gpt-4o")),
  overflow: await refused(model(), "hello world ".repeat(500)),
}));
