/**
 * LinVideo Linearize in the browser: what was set in one mode is there again when the mode is.
 *
 * ComfyUI makes the widgets of a mode anew whenever the mode is chosen, and drops its links. What
 * the other modes held waits in the node's properties, so it is saved with the workflow.
 *
 * The node also grows as far as what it says and shows needs: ComfyUI leaves two lines for words.
 */

import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";

const NODE = "LinVideo";
const MODE = "mode";
const PROPERTY = "other modes";

const TRANSFER = "run the transfer now";
const WORDS = "$$node-text-preview";
const PICTURE = "$$canvas-image-preview";
/** Of the graph's units: a line and a letter of the words, what is around them, a picture. */
const LINE = 18;
const LETTER = 6.2;
const MARGIN = 50;
const PICTURE_HEIGHT = 430;

let files = [];

const ownName = (thing) => thing.name.startsWith(`${MODE}.`);

function listFiles(nodeData) {
  const [, { options }] = nodeData.input.required[MODE];
  const spec = options.flatMap(({ inputs }) => inputs.required?.file ?? []);
  return Array.isArray(spec[0]) ? spec[0] : spec[1].options;
}

/** Widgets of a mode know the files of when the page was loaded: "R" must reach them, too. */
function refreshFiles(node) {
  const widget = node.widgets.find(({ name }) => name === `${MODE}.file`);
  if (widget) widget.options.values = files;
}

class ModeMemory {
  constructor(node) {
    this.node = node;
    this.mode = node.widgets.find(({ name }) => name === MODE);
    /** The mode whose widgets are shown; null while a saved node is read. */
    this.shown = null;
    this.follow();
  }

  /** Call a function beside a method of the node or of a widget, before it. */
  before(owner, method, call) {
    const original = owner[method];
    owner[method] = function (...args) {
      call(...args);
      return original?.apply(this, args);
    };
  }

  follow() {
    const { node, mode } = this;
    this.before(node, "onConnectionsChange", (...change) => this.keepLink(...change));
    const changed = mode.callback;
    mode.callback = (...args) => {
      this.watch();
      this.restore();
      return changed?.apply(mode, args);
    };
    const configure = node.configure;
    node.configure = (info) => {
      this.shown = null;
      configure.call(node, info);
      // Each widget that came with the mode set the height to the least.
      if (info.size) node.setSize([...info.size].map((side, i) => Math.max(side, node.size[i])));
      this.watch();
    };
    this.watch();
  }

  watch() {
    this.shown = this.mode.value;
    refreshFiles(this.node);
    for (const widget of this.node.widgets.filter(ownName)) {
      this.before(widget, "onRemove", () => this.keep("values", widget.name, widget.value));
    }
  }

  keep(kind, name, value) {
    if (this.shown === null) return;
    const modes = this.node.properties[PROPERTY] ?? {};
    const mode = modes[this.shown] ?? {};
    const kept = { ...mode, [kind]: { ...mode[kind], [name]: value } };
    this.node.properties[PROPERTY] = { ...modes, [this.shown]: kept };
  }

  /** Keep a link that goes because the mode has changed, not one that is taken away by hand. */
  keepLink(_side, _slot, isConnected, link, input) {
    if (isConnected || !link || !input || !ownName(input) || this.mode.value === this.shown) return;
    const { origin_id: from, origin_slot: slot } = link;
    this.keep("links", input.name, { from, slot, to: this.node.id });
  }

  restore() {
    const { [this.shown]: kept, ...others } = this.node.properties[PROPERTY] ?? {};
    this.node.properties[PROPERTY] = others;
    for (const widget of this.node.widgets.filter(ownName)) {
      if (widget.name in (kept?.values ?? {})) widget.value = kept.values[widget.name];
    }
    for (const [name, link] of Object.entries(kept?.links ?? {})) this.reconnect(name, link);
  }

  /** A copy of the node, whose id is another, stays unconnected. */
  reconnect(name, { from, slot, to }) {
    const origin = to === this.node.id ? this.node.graph?.getNodeById(from) : null;
    const index = this.node.inputs.findIndex((input) => input.name === name);
    if (origin && this.node.inputs[index]?.link == null) origin.connect(slot, this.node, index);
  }
}

function allNodes() {
  const graphs = [app.rootGraph, ...app.rootGraph.subgraphs.values()];
  return graphs.flatMap((graph) => graph.nodes).filter(({ type }) => type === NODE);
}

/** Make a node as high as its words and, while it trains, its picture need; never lower. */
function makeRoom(node) {
  const find = (wanted) => node.widgets.find(({ name }) => name === wanted);
  const words = find(WORDS);
  if (words) {
    const letters = (node.size[0] - MARGIN) / LETTER;
    const lines = String(words.value).split("\n").map(({ length }) => Math.ceil(length / letters));
    const height = LINE * (1 + lines.reduce((sum, count) => sum + Math.max(1, count), 0));
    words.options.getMinHeight = () => height;
  }
  const picture = find(PICTURE);
  if (picture && find(MODE).value === TRANSFER) {
    picture.computeLayoutSize = () => ({ minHeight: PICTURE_HEIGHT, minWidth: 1 });
  }
  const [, height] = node.computeSize();
  if (height > node.size[1]) node.setSize([node.size[0], height]);
  node.setDirtyCanvas(true, true);
}

app.registerExtension({
  name: "LinVideo.Linearize",

  setup() {
    // After ComfyUI's own listeners have made the widgets of words and pictures.
    const grow = () => setTimeout(() => allNodes().forEach(makeRoom));
    for (const event of ["progress_text", "executed", "b_preview_with_metadata"]) {
      api.addEventListener(event, grow);
    }
  },

  beforeRegisterNodeDef(nodeType, nodeData) {
    if (nodeData.name !== NODE) return;
    files = listFiles(nodeData);
    const created = nodeType.prototype.onNodeCreated;
    nodeType.prototype.onNodeCreated = function (...args) {
      created?.apply(this, args);
      new ModeMemory(this);
    };
  },

  refreshComboInNodes() {
    allNodes().forEach(refreshFiles);
  },
});
