// What an answer took: as it is seen from here, and as the server tells it stage by stage.

import { make } from "./dom.js";

const STAGES = [
  ["preprocess", "fetching and decoding"],
  ["encode", "encoding the media"],
  ["prefill", "reading the prompt"],
  ["decode", "writing the answer"],
];

/** Times one answer, in milliseconds from its making. */
export class Meter {
  began = performance.now();
  first = null;
  last = null;
  usage = null;
  stages = null;

  /** Note a chunk that has just come. */
  note(chunk) {
    if (chunk.choices[0]?.delta.content) {
      this.last = performance.now() - this.began;
      this.first ??= this.last;
    }
    this.usage = chunk.usage ?? this.usage;
    this.stages = chunk.triptych ?? this.stages;
  }

  /** Tokens a second between the first one and the last; null: there are too few to tell. */
  get speed() {
    const after = (this.usage?.completion_tokens ?? 0) - 1;
    return after > 0 && this.last > this.first ? (after / (this.last - this.first)) * 1000 : null;
  }
}

/** What is known so far, as an element. */
export function show(meter) {
  const facts = [];
  if (meter.first !== null) facts.push(["First token", time(meter.first)]);
  if (meter.speed !== null) facts.push(["Speed", `${meter.speed.toFixed(1)} tokens/s`]);
  if (meter.usage) {
    facts.push(["Tokens", `${meter.usage.prompt_tokens} in, ${meter.usage.completion_tokens} out`]);
    const { cached_tokens: cached = 0 } = meter.usage.prompt_tokens_details ?? {};
    facts.push(["Prompt cached", `${cached} of ${meter.usage.prompt_tokens}`]);
  }
  if (meter.stages?.media) {
    facts.push(["Media cached", `${meter.stages.media_cached} of ${meter.stages.media}`]);
  }
  const list = make("dl", {}, ...facts.map(([name, value]) => fact(name, value)));
  return make("div", { class: "stats" }, list, ...(meter.stages ? [bar(meter.stages)] : []));
}

function fact(name, value) {
  return make("div", {}, make("dt", {}, name), make("dd", {}, value));
}

function bar(stages) {
  const took = STAGES.map(([name]) => stages[`${name}_ms`]);
  const words = STAGES.map(([name], index) => `${name} ${time(took[index])}`);
  const strip = make("div", { class: "bar", role: "img", "aria-label": words.join(", ") });
  const legend = make("ul", { class: "legend", "aria-hidden": "true" });
  STAGES.forEach(([name, meaning], index) => {
    const piece = make("i", { class: name });
    piece.style.flexGrow = Math.max(took[index], 0.001);
    strip.append(piece);
    legend.append(make("li", { title: meaning }, make("i", { class: name }), words[index]));
  });
  return make("div", { class: "stages" }, strip, legend);
}

function time(ms) {
  if (ms >= 1000) return `${(ms / 1000).toFixed(2)} s`;
  return ms >= 10 ? `${ms.toFixed(0)} ms` : `${ms.toFixed(1)} ms`;
}
