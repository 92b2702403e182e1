// What all pages share: parts that come later, buttons that copy, forms that send themselves.

document.documentElement.classList.add("js");

async function fill(place) {
  try {
    const answer = await fetch(place.dataset.part);
    const words = await answer.text();
    if (answer.ok) place.innerHTML = words; // a part of our own server
    else place.textContent = words.trim() || "This part cannot be shown.";
  } catch {
    place.textContent = "The explorer does not answer. Is it still running?";
  }
  place.removeAttribute("aria-busy");
  place.dispatchEvent(new CustomEvent("cellstore:part", { bubbles: true }));
}

for (const place of document.querySelectorAll("[data-part]")) fill(place);

document.addEventListener("click", async (event) => {
  const button = event.target.closest("button[data-copy]");
  if (!button) return;
  const words = button.textContent;
  try {
    await navigator.clipboard.writeText(button.dataset.copy);
    button.textContent = "Copied";
  } catch {
    button.textContent = "Select the text to copy it";
  }
  setTimeout(() => { button.textContent = words; }, 2000);
});

for (const button of document.querySelectorAll("[data-back]")) {
  button.hidden = history.length < 2;
  button.addEventListener("click", () => history.back());
}

document.addEventListener("change", (event) => {
  const form = event.target.closest("form[data-auto]");
  const typed = event.target.matches("[type=text], [type=search]:not([list])");
  if (form && !typed) form.requestSubmit();
});
