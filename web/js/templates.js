/** The template browser takes workflows as the server's disk lists them; LinVideo's are numbered. */

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";

const PACK = decodeURIComponent(import.meta.url.split("/").at(-3));

app.registerExtension({
  name: "LinVideo.Templates",

  init() {
    const fetched = api.getWorkflowTemplates;
    api.getWorkflowTemplates = async function () {
      const templates = await fetched.call(this);
      templates[PACK]?.sort();
      return templates;
    };
  },
});
