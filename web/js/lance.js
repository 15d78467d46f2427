// What Lance's nodes show on the canvas beyond their inputs: the answer of Lance Understand, while it is written and
// afterwards, and on the latent nodes a line with what the chosen size means. Plain JavaScript for frontends 1.27 to 1.58.
//
// Nothing here ever turns text into HTML: answers go into a textarea's value, everything else into textContent.

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";

// Nodes that show a text they make, and what it is called on the node.
const ANSWERING = { LanceUnderstand: "answer", LanceEnhancePrompt: "prompt", LanceScore: "scores" };
const EMPTY = "EmptyLanceLatent";
const FROM_IMAGE = "LanceImageToVideoLatent";

// What sizes mean, from the schema of the latent nodes (nodes/nodes_latent.py, canvas_facts): sizes in pixels by preset and
// aspect, what a latent cell is, limits, and the bytes of weights and of a denoising step. Nothing of it is said twice.
let facts = null;

const WORDS = {
  en: {
    answer: "answer",
    prompt: "prompt",
    scores: "scores",
    waiting: "The answer appears here.",
    image: "1 image",
    frames: (n) => `${n} frames`,
    lowered: (from, to) => `${from} → ${to} frames (4k+1)`,
    seconds: (n) => `${n} s`,
    tokens: (n) => `${n} tokens`,
    memory: (gb) => `≈ ${gb} GB (bf16)`,
    linked: "size comes from a connected input",
    large: (side) => `more than ${side} pixels a side: will be refused`,
    small: "less than 16 pixels a side: will be refused",
    long: (n) => `more than ${n} frames: only with Wan Context Windows on the model`,
    hint:
      "≈ before a size: as many pixels, in the start image's shape. Tokens are latent cells. The memory is an estimate of what keeps everything on the GPU while denoising with guidance; " +
      "with less, ComfyUI moves weights to RAM and back and takes longer.",
  },
  zh: {
    answer: "回答",
    prompt: "提示词",
    scores: "分数",
    waiting: "回答会显示在这里。",
    image: "1 张图像",
    frames: (n) => `${n} 帧`,
    lowered: (from, to) => `${from} → ${to} 帧（4k+1）`,
    seconds: (n) => `${n} 秒`,
    tokens: (n) => `${n} 个 token`,
    memory: (gb) => `≈ ${gb} GB（bf16）`,
    linked: "尺寸由连接的输入决定",
    large: (side) => `单边超过 ${side} 像素：会被拒绝`,
    small: "单边不足 16 像素：会被拒绝",
    long: (n) => `超过 ${n} 帧：模型上须接 Wan Context Windows`,
    hint: "尺寸前的 ≈：像素数相同，比例随起始图像。token 即潜空间格子数。显存为估算值：带引导去噪时把全部内容留在 GPU 上所需；显存较少时 ComfyUI 会在内存与显存间搬运权重，速度较慢。",
  },
};

function words() {
  const locale = app.extensionManager?.setting?.get("Comfy.Locale") ?? "en";
  return locale === "zh" || locale === "zh-CN" ? WORDS.zh : WORDS.en;
}

/** Let `then` run after object[name], whatever that is so far. */
function after(object, name, then) {
  const before = object[name];
  object[name] = function (...args) {
    const result = before?.apply(this, args);
    then.apply(this, args);
    return result;
  };
}

/** Keep a widget of ours out of saved workflows' widget values and out of what is queued. */
function unsaved(widget) {
  widget.serialize = false;
  widget.options.serialize = false;
  return widget;
}

// -- Lance Understand ---------------------------------------------------------------------------------------------------

const KEPT = "lance_answer"; // the node property that keeps the answer when the workflow is saved or its tab left

function addAnswer(node) {
  const text = words();
  const spec = ["STRING", { multiline: true, placeholder: text.waiting }];
  const { widget } = app.widgets.STRING(node, "lance_answer", spec, app);
  unsaved(widget);
  widget.label = text[ANSWERING[node.comfyClass]];
  Object.assign(widget.options, { read_only: true, getMinHeight: () => 110 });
  Object.assign(widget.element, { readOnly: true, placeholder: text.waiting });
  widget.element.classList.add("lance-answer");
  node.lanceAnswer = (text) => {
    widget.value = text;
    node.setDirtyCanvas?.(true, false);
  };
  after(node, "onExecuted", (output) => {
    if (!Array.isArray(output?.text)) return;
    const text = output.text.join("\n");
    node.properties[KEPT] = text;
    node.lanceAnswer(text);
  });
  after(node, "onConfigure", () => node.lanceAnswer(String(node.properties[KEPT] ?? "")));
}

/** The node an execution id such as "12" or, inside subgraphs, "12:3" means. */
function nodeById(id) {
  let graph = app.rootGraph ?? app.graph;
  let node = null;
  for (const part of String(id).split(":")) {
    node = graph?.getNodeById(part) ?? graph?.getNodeById(Number(part));
    graph = node?.subgraph;
  }
  return node;
}

/** Write what the server streams for our node into its answer, instead of letting the frontend know. */
function streamAnswers() {
  // A listener would be too late: the frontend's own comes first and shows the same text a second time, 1.27 as HTML.
  const dispatch = api.dispatchCustomEvent;
  api.dispatchCustomEvent = function (type, detail) {
    const node = type === "progress_text" ? nodeById(detail?.nodeId) : null;
    if (!node?.lanceAnswer) return dispatch.apply(this, arguments);
    node.lanceAnswer(String(detail.text ?? ""));
    return true;
  };
}

// -- The latent nodes ---------------------------------------------------------------------------------------------------

function addInfo(node) {
  const [element, size, cost] = ["div", "div", "div"].map((tag) => document.createElement(tag));
  element.className = "lance-info";
  element.append(size, cost);
  Object.assign(element.style, {
    boxSizing: "border-box",
    color: "var(--input-text, #ddd)",
    fontSize: "11px",
    lineHeight: "16px",
    overflow: "hidden",
    padding: "2px 4px",
    textAlign: "center",
    whiteSpace: "nowrap",
  });
  cost.style.opacity = "0.7";
  const height = 36;
  const options = { margin: 4, getMinHeight: () => height + 8, getMaxHeight: () => height + 8, getValue: () => "" };
  unsaved(node.addDOMWidget("lance_info", "lance_info", element, options));

  const update = () => {
    const { what, warning, tokens, batch } = describe(node);
    const text = words();
    element.title = text.hint;
    size.textContent = what;
    size.style.color = warning ? "var(--warning-foreground, #e0a030)" : "";
    const times = batch > 1 ? `${batch} × ` : "";
    cost.textContent = tokens ? `${times}${text.tokens(tokens.toLocaleString("en"))} · ${text.memory(gigabytes(tokens, batch))}` : "";
    greyOut(node);
  };
  for (const widget of node.widgets) if (widget.name !== "lance_info") after(widget, "callback", update);
  after(node, "onConfigure", update);
  after(node, "onConnectionsChange", update);
  update();
}

/** As DenoisingMemory.step in lance_core/model/memory.py, for a prompt that is short beside the picture. */
function gigabytes(tokens, batch) {
  const bytes = facts.memory;
  const rows = bytes.rows * batch;
  const some = (count) => Math.min(count, bytes.chunk);
  const attending = rows * (tokens * bytes.attending + some(tokens) * bytes.rotating);
  const feeding = rows * tokens * bytes.feeding + some(rows * tokens) * bytes.widening;
  const kept = tokens * (bytes.key_value + bytes.residual);
  return ((bytes.weights + kept + Math.max(attending, feeding)) / 1e9).toFixed(0);
}

/** What the node's values make: {what, warning, tokens, batch}; no tokens where they cannot be told. */
function describe(node) {
  const text = words();
  const value = (name) => node.widgets.find((widget) => widget.name === name)?.value;
  const linked = (name) => node.inputs?.some((input) => input.widget?.name === name && input.link != null);
  const custom = value("size") === "custom";
  const deciding = ["size", "frames", "batch_size", ...(custom ? ["width", "height"] : ["aspect"])];
  if (deciding.some(linked)) return { what: text.linked };

  const asked = Math.floor(Number(value("frames")));
  const frames = Math.floor((asked - 1) / facts.frames_per_latent) * facts.frames_per_latent + 1;
  const batch = Number(value("batch_size"));
  if (asked > facts.max_frames) return { what: text.long(facts.max_frames), warning: true };

  let width, height, shape;
  if (custom) {
    [width, height] = ["width", "height"].map((name) => Math.floor(Number(value(name)) / facts.cell) * facts.cell);
    if (Math.min(width, height) < facts.cell) return { what: text.small, warning: true };
    if (Math.max(width, height) > facts.max_side && !released(width, height))
      return { what: text.large(facts.max_side), warning: true };
  } else if (node.comfyClass === FROM_IMAGE) {
    width = height = facts.sides[value("size")];
    shape = `≈ ${width} × ${height}`;
  } else {
    [width, height] = facts.sizes[value("size")]?.[value("aspect")] ?? [];
  }
  if (!width || !height || !(frames >= 1)) return { what: "" };

  const parts = [shape ?? `${width} × ${height}`];
  if (asked === 1) parts.push(text.image);
  else parts.push(asked === frames ? text.frames(frames) : text.lowered(asked, frames), text.seconds((frames / facts.fps).toFixed(1)));
  const cells = (width / facts.cell) * (height / facts.cell);
  const tokens = (1 + (frames - 1) / facts.frames_per_latent) * cells;
  return { what: parts.join(" · "), warning: asked !== frames, tokens, batch };
}

function released(width, height) {
  return Object.values(facts.sizes).some((table) => Object.values(table).some(([w, h]) => w === width && h === height));
}

/** Grey what the chosen size does not look at. */
function greyOut(node) {
  const custom = node.widgets.find((widget) => widget.name === "size")?.value === "custom";
  const used = { width: custom, height: custom, aspect: !custom };
  for (const widget of node.widgets) {
    if (widget.name in used) widget.disabled = widget.options.disabled = !used[widget.name];
  }
  node.setDirtyCanvas?.(true, false);
}

app.registerExtension({
  name: "Lance",
  setup: streamAnswers,
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (nodeData.name === EMPTY) facts = nodeData.input.required.size[1].lance;
  },
  nodeCreated(node) {
    if (node.comfyClass in ANSWERING) addAnswer(node);
    if (facts && (node.comfyClass === EMPTY || node.comfyClass === FROM_IMAGE)) addInfo(node);
    if (node.comfyClass === "LanceVAEDecode" && node.size[0] < 200) node.setSize([200, node.size[1]]); // room for its title
  },
});
