// What Lance's nodes show on the canvas beyond their inputs: the answer of Lance Understand, while it is written and
// afterwards, and on the latent nodes a line with what the chosen size means. Plain JavaScript for frontends 1.27 to 1.58.
//
// Nothing here ever turns text into HTML: answers go into a textarea's value, everything else into textContent.

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";

const ANSWERING = "LanceUnderstand";
const EMPTY = "EmptyLanceLatent";
const FROM_IMAGE = "LanceImageToVideoLatent";

// [width, height] by preset and aspect. The same as SIZES in lance_core/request.py; tests/host/test_web.py compares them.
const SIZES = {
  image_768res: {
    "21:9": [1168, 496], "16:9": [1024, 576], "3:2": [944, 624], "4:3": [880, 672],
    "1:1": [768, 768], "3:4": [672, 880], "2:3": [624, 944], "9:16": [576, 1024],
  },
  video_480p: {
    "21:9": [976, 416], "16:9": [848, 480], "3:2": [784, 528], "4:3": [736, 560],
    "1:1": [640, 640], "3:4": [560, 736], "2:3": [528, 784], "9:16": [480, 848],
  },
  video_360p: {
    "21:9": [672, 288], "16:9": [640, 352], "3:2": [528, 352], "4:3": [560, 416],
    "1:1": [480, 480], "3:4": [416, 560], "2:3": [352, 528], "9:16": [352, 640],
  },
};
// Side of the square with as many pixels as a start picture gets, whatever its shape.
const SIDES = { video_480p: 640, video_360p: 480, video_192p: 256 };
const CELL = 16; // pixels a side of one latent token
const MAX_SIDE = 1024; // pixels, unless the size is one of SIZES
const MAX_FRAMES = 121;
const FPS = 12;

// Bytes in bfloat16 with the released weights, as LanceModel.memory_required (nodes/model.py) counts them: the weights of
// both experts; per token its key and value in every layer and its input; and what is widest, attention, whose float32 queries
// exist for PIECE tokens of each row at once, or the feed-forward, whose widest tensors exist for PIECE tokens at once.
const WEIGHTS = 12.35e9;
const PER_TOKEN = 2 * 2 * 128 * 36 * 2 + 2048 * 2;
const ATTENDING = (2 * (2048 + (16 + 2 * 2) * 128 + 16 * 128) + 16 * 128) * 2;
const ROTATING = 8 * 16 * 128;
const FEEDING = 4 * 2048 * 2;
const PIECE = 8192;
const PER_PIECE_TOKEN = 2 * 11008 * 2;
const GUIDANCE = 2; // rows a result takes: with the prompt and without it

const WORDS = {
  en: {
    answer: "answer",
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
    long: (n) => `more than ${n} frames: will be refused`,
    hint:
      "≈ before a size: as many pixels, in the start image's shape. Tokens are latent cells. The memory is an estimate of what keeps everything on the GPU while denoising with guidance; " +
      "with less, ComfyUI moves weights to RAM and back and takes longer.",
  },
  zh: {
    answer: "回答",
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
    long: (n) => `超过 ${n} 帧：会被拒绝`,
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
  widget.label = text.answer;
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

function gigabytes(tokens, batch) {
  const rows = GUIDANCE * batch;
  const attending = rows * (tokens * ATTENDING + Math.min(tokens, PIECE) * ROTATING);
  const feeding = rows * tokens * FEEDING + Math.min(rows * tokens, PIECE) * PER_PIECE_TOKEN;
  const bytes = WEIGHTS + tokens * PER_TOKEN + Math.max(attending, feeding);
  return (bytes / 1e9).toFixed(0);
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
  const frames = Math.floor((asked - 1) / 4) * 4 + 1;
  const batch = Number(value("batch_size"));
  if (asked > MAX_FRAMES) return { what: text.long(MAX_FRAMES), warning: true };

  let width, height, shape;
  if (custom) {
    [width, height] = ["width", "height"].map((name) => Math.floor(Number(value(name)) / CELL) * CELL);
    if (Math.min(width, height) < CELL) return { what: text.small, warning: true };
    if (Math.max(width, height) > MAX_SIDE && !released(width, height)) return { what: text.large(MAX_SIDE), warning: true };
  } else if (node.comfyClass === FROM_IMAGE) {
    width = height = SIDES[value("size")];
    shape = `≈ ${width} × ${height}`;
  } else {
    [width, height] = SIZES[value("size")]?.[value("aspect")] ?? [];
  }
  if (!width || !height || !(frames >= 1)) return { what: "" };

  const parts = [shape ?? `${width} × ${height}`];
  if (asked === 1) parts.push(text.image);
  else parts.push(asked === frames ? text.frames(frames) : text.lowered(asked, frames), text.seconds((frames / FPS).toFixed(1)));
  const tokens = (1 + (frames - 1) / 4) * (width / CELL) * (height / CELL);
  return { what: parts.join(" · "), warning: asked !== frames, tokens, batch };
}

function released(width, height) {
  return Object.values(SIZES).some((table) => Object.values(table).some(([w, h]) => w === width && h === height));
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
  nodeCreated(node) {
    if (node.comfyClass === ANSWERING) addAnswer(node);
    if (node.comfyClass === EMPTY || node.comfyClass === FROM_IMAGE) addInfo(node);
    if (node.comfyClass === "LanceVAEDecode" && node.size[0] < 200) node.setSize([200, node.size[1]]); // room for its title
  },
});
