"use strict";
(() => {
  const all = (selector, inside = document) => [...inside.querySelectorAll(selector)];

  // Sorting: numbers by size with the best guess first, names by letters; what is not known stays at the end.
  const sortBy = (head) => {
    const row = head.parentElement, place = [...row.children].indexOf(head), body = head.closest("table").tBodies[0];
    const downwards = head.getAttribute("aria-sort") === (place ? "none" : "ascending") || head.getAttribute("aria-sort") === "ascending";
    const value = (one) => one.children[place].dataset.value;
    const order = (one, other) => {
      const [left, right] = [value(one), value(other)];
      if (left === "" || right === "") return (left === "") - (right === "");
      const ahead = place ? Number(left) - Number(right) : left.localeCompare(right);
      return downwards ? -ahead : ahead;
    };
    all("th", row).forEach((one) => one.setAttribute("aria-sort", "none"));
    head.setAttribute("aria-sort", downwards ? "descending" : "ascending");
    body.append(...[...body.rows].sort(order));
  };
  all("thead button").forEach((button) => button.addEventListener("click", () => sortBy(button.parentElement)));

  // Filtering: baselines stay, since no row means anything without them.
  const form = document.getElementById("filters"), rows = all("[data-find]");
  const filter = () => {
    const text = form.elements.find.value.trim().toLowerCase(), most = parseFloat(form.elements.flops.value) / 100;
    for (const row of rows) {
      const named = row.dataset.find.toLowerCase().includes(text);
      const cheap = !(most >= 0) || (row.dataset.flops !== "" && Number(row.dataset.flops) <= most + 1e-9);
      row.hidden = !(row.classList.contains("baseline") || (named && cheap));
    }
    const counted = (some) => new Set(some.map((row) => row.dataset.row)).size; // a row stands in two tables, and has a picture
    const filtered = text !== "" || most >= 0;
    form.querySelector("output").textContent = filtered ? `${counted(rows.filter((row) => !row.hidden))} of ${counted(rows)} rows; baselines always stay` : "";
  };
  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  filter();

  // A link to a row opens what stands behind it.
  const open = () => {
    const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (target && target.tagName === "DETAILS") {
      target.open = true;
      target.querySelector("summary").focus();
      target.scrollIntoView();
    }
  };
  window.addEventListener("hashchange", open);
  open();

  // Plots. `ast` has expressions interpreted and not compiled, as the page's policy wants it.
  const options = { mode: "vega-lite", actions: false, renderer: "svg", ast: true, defaultStyle: false, logLevel: 1 };
  all("script.plots").forEach(async (script) => {
    const { data, documents } = JSON.parse(script.textContent), box = script.parentElement;
    const choice = box.querySelector("select");
    const draw = (place, index) =>
      window.vegaEmbed(place, { ...documents[index], datasets: { points: structuredClone(data) } }, options);
    const views = (await Promise.all(all(".plot", box).map(draw))).map((result) => result.view);
    const show = () => views.forEach((view) => view.signal("view", choice.value).runAsync());
    choice.addEventListener("change", show);
    show();
  });
})();
