// Asks the user for the server's API key when the server asks for it.

import { apiKey } from "./api.js";

const byId = (id) => document.getElementById(id);
const dialog = byId("key-dialog");
byId("no-key").addEventListener("click", () => dialog.close());

/** Do this; where the server asks for its key, ask the user for it and do it again. */
export async function withKey(action) {
  for (;;) {
    try {
      return await action();
    } catch (error) {
      if (error.status !== 401 || !(await askForKey())) throw error;
    }
  }
}

/** Whether a key was given. */
function askForKey() {
  if (apiKey.get()) byId("key-reason").textContent = "The server does not take this key. Enter another one.";
  byId("key").value = "";
  if (!dialog.open) {
    dialog.returnValue = "";
    dialog.showModal();
  }
  return new Promise((resolve) => {
    const closed = () => {
      const given = dialog.returnValue === "use";
      if (given) apiKey.set(byId("key").value.trim());
      resolve(given);
    };
    dialog.addEventListener("close", closed, { once: true });
  });
}
