/** The colours of LinVideo's own sockets and links, in both designs of ComfyUI's nodes. */

import { app } from "../../../scripts/app.js";

const COLOURS = { LINVIDEO: "#3fb68e", LINVIDEO_SETTINGS: "#9db63f" };

/** Colour a type wherever a palette, which knows nothing of it, leaves it uncoloured. */
function colour(colours, type) {
  let chosen = "";
  Object.defineProperty(colours, type, {
    configurable: true,
    enumerable: true,
    get: () => chosen || COLOURS[type],
    set: (value) => (chosen = value),
  });
}

app.registerExtension({
  name: "LinVideo.Sockets",

  setup() {
    const variables = Object.entries(COLOURS).map(([type, value]) => {
      colour(app.canvas.default_connection_color_byType, type);
      colour(app.canvas.constructor.link_type_colors, type);
      return `--color-datatype-${type}: ${value};`;
    });
    const style = document.createElement("style");
    style.textContent = `:root { ${variables.join(" ")} }`;
    document.head.append(style);
  },
});
