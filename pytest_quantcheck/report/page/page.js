"use strict";
{
  const STEP = 100;
  const number = (text) => Number.parseFloat(text.replaceAll(",", ""));
  const compare = (one, other) => {
    const left = number(one), right = number(other);
    if (Number.isNaN(left) || Number.isNaN(right)) return Number.isNaN(right) - Number.isNaN(left) || one.localeCompare(other);
    return left - right;
  };

  const tensors = (section) => {
    const rows = JSON.parse(document.getElementById(section.dataset.rows).textContent);
    const search = section.querySelector("input"), said = section.querySelector("output");
    const more = section.querySelector(".more"), body = section.querySelector("tbody");
    const heads = [...section.querySelectorAll("th")];
    const texts = heads.map((head) => head.className);
    const haystack = rows.map((row) => row.join(" ").toLowerCase());
    let order = rows.map((_, at) => at), found = order, limit = STEP;

    const line = (at) => {
      const tr = document.createElement("tr");
      if (rows[at].includes("failed", 2)) tr.className = "bad";
      rows[at].forEach((cell, column) => {
        const td = tr.insertCell();
        td.className = texts[column];
        td.textContent = cell;
      });
      return tr;
    };
    const show = () => {
      body.replaceChildren(...found.slice(0, limit).map(line));
      more.hidden = found.length <= limit;
      const all = rows.length.toLocaleString("en");
      said.textContent = found.length === rows.length ? `${all} tensors` : `${found.length.toLocaleString("en")} of ${all} tensors`;
    };
    const filter = () => {
      const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      found = order.filter((at) => words.every((word) => haystack[at].includes(word)));
      limit = STEP;
      show();
    };
    const sort = (column) => {
      const down = heads[column].getAttribute("aria-sort") === "ascending";
      heads.forEach((head) => head.removeAttribute("aria-sort"));
      heads[column].setAttribute("aria-sort", down ? "descending" : "ascending");
      const sign = down ? -1 : 1;
      const by = texts[column] === "text" ? (a, b) => a.localeCompare(b, "en", { numeric: true }) : compare;
      order = rows.map((_, at) => at).sort((a, b) => sign * by(rows[a][column], rows[b][column]) || a - b);
      filter();
    };
    search.addEventListener("input", filter);
    more.addEventListener("click", () => { limit *= 4; show(); });
    heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => sort(column)));
    show();
  };

  // Following a frame changes what the map shows, not where the page is scrolled to.
  const zoom = (link) => {
    const { scrollX, scrollY } = window;
    location.hash = link.getAttribute("href");
    window.scrollTo(scrollX, scrollY);
    document.querySelector(":target")?.focus({ preventScroll: true });
  };
  document.addEventListener("click", (event) => {
    const link = event.target.closest(".map a");
    if (link === null) return;
    event.preventDefault();
    zoom(link);
  });
  document.addEventListener("keydown", (event) => {
    const out = document.querySelector(".view:target figcaption a:last-of-type");
    if (event.key === "Escape" && out !== null && document.activeElement?.tagName !== "INPUT") zoom(out);
  });
  const open = () => document.querySelector(":target")?.closest("details")?.setAttribute("open", "");
  window.addEventListener("hashchange", open);
  window.addEventListener("beforeprint", () => document.querySelectorAll("details.artifact").forEach((part) => { part.open = true; }));

  document.querySelectorAll("[data-rows]").forEach(tensors);
  open();
}
