(async function () {
  "use strict";
  const data = JSON.parse(document.getElementById("data").textContent);
  const all = (query, root) => [...(root || document).querySelectorAll(query)];
  const one = (id) => document.getElementById(id);
  const on = (id, event, act) => { if (one(id)) one(id).addEventListener(event, act); };  // a page may lack a part
  const state = { request: data.requests[0], focus: [], views: {}, sort: "", down: false };

  // Colours of text and axes; the page's own are in its style sheet.
  const theme = (dark) => {
    const ink = dark ? "#d9d7d1" : "#3a3f46", quiet = dark ? "#3a3f47" : "#e4e1d8";
    const words = { labelColor: ink, titleColor: ink, labelFontSize: 12, titleFontSize: 12, titleFontWeight: 500 };
    return {
      background: "transparent", font: "system-ui, -apple-system, Segoe UI, Roboto, DejaVu Sans, sans-serif",
      axis: { ...words, gridColor: quiet, domainColor: ink, tickColor: ink }, axisQuantitative: { tickCount: 6 }, legend: words,
      header: words, title: { color: ink }, text: { fill: ink }, view: { stroke: null },
    };
  };
  const dark = () => document.documentElement.dataset.theme === "dark";

  async function draw(key) {
    if (state.views[key]) state.views[key].finalize();
    const options = {
      renderer: "svg", config: theme(dark()), tooltip: { theme: "custom" },
      actions: { export: true, source: false, compiled: false, editor: false }, downloadFileName: "palimpsest-" + key,
    };
    const result = await vegaEmbed("#chart-" + key, data.charts[key], options);
    state.views[key] = result;
    result.view.signal("request", state.request).signal("focus", state.focus);
    result.view.addEventListener("click", (_, item) => {
      const label = item && item.datum && item.datum.label;
      if (label !== undefined && label in data.colours) pick(label);
    });
    await result.view.runAsync();
  }
  const drawAll = () => Promise.all(Object.keys(data.charts).map(draw));

  async function update() {
    all("[data-request]").forEach((item) => {
      if (item.matches(".tab")) item.setAttribute("aria-selected", String(item.dataset.request === state.request));
      else item.hidden = item.dataset.request !== state.request;
    });
    all("[data-label]").forEach((item) => {
      const picked = state.focus.includes(item.dataset.label);
      if (item.matches(".chip")) item.setAttribute("aria-pressed", String(picked));
      else item.classList.toggle("dim", state.focus.length > 0 && !picked);
    });
    one("all").hidden = state.focus.length === 0;
    list();
    await Promise.all(Object.values(state.views).map((item) =>
      item.view.signal("request", state.request).signal("focus", state.focus).runAsync()));
  }

  function pick(label) {
    state.focus = state.focus.includes(label) ? state.focus.filter((item) => item !== label) : [...state.focus, label];
    return update();
  }

  const number = (entry) => {
    const cell = document.createElement("td");
    cell.className = "number";
    if (!entry) return cell;
    cell.append(String(entry[0]));
    if (entry.length === 3) {
      const range = document.createElement("span");
      range.className = "range";
      range.textContent = ` [${entry[1]}, ${entry[2]}]`;
      cell.append(range);
    }
    return cell;
  };
  const words = (text) => {
    const cell = document.createElement("td");
    cell.textContent = text;
    return cell;
  };

  function list() {
    if (!one("findings")) return;
    const wanted = one("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const deciding = one("deciding").checked;
    const rows = data.findings.filter((row) => {
      const text = `${row.label} ${row.finding} ${row.judgement} ${row.note}`.toLowerCase();
      return row.request === state.request && (!deciding || row.bears)
        && (!state.focus.length || state.focus.includes(row.label)) && wanted.every((word) => text.includes(word));
    });
    if (state.sort) {
      const value = (row) => (Array.isArray(row[state.sort]) ? row[state.sort][0] : row[state.sort]);
      rows.sort((a, b) => {
        const [x, y] = [value(a), value(b)];
        if (x == null || y == null) return (x == null) - (y == null);
        return (x < y ? -1 : x > y ? 1 : 0) * (state.down ? -1 : 1);
      });
    }
    const body = one("findings").tBodies[0];
    body.replaceChildren(...rows.map((row) => {
      const line = document.createElement("tr");
      line.append(words(row.label), words(row.finding), number(row.value), number(row.original), number(row.retrained),
        number(row.k), words(row.judgement), number([row.n]), words(row.note));
      return line;
    }));
    one("count").textContent = `${rows.length} of ${data.findings.filter((row) => row.request === state.request).length}`;
  }

  function csv() {
    const columns = ["request", "label", "finding", "value", "low", "high", "original", "retrained", "k", "k_low",
      "k_high", "judgement", "n", "note"];
    const quoted = (value) => `"${String(value ?? "").replaceAll('"', '""')}"`;
    const lines = data.findings.map((row) => {
      const [value, low, high] = row.value || [], [k, kLow, kHigh] = row.k || [];
      const flat = { ...row, value, low, high, k, k_low: kLow, k_high: kHigh,
        original: (row.original || [])[0], retrained: (row.retrained || [])[0] };
      return columns.map((name) => quoted(flat[name])).join(",");
    });
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([[columns.join(","), ...lines].join("\r\n")], { type: "text/csv" }));
    link.download = "findings.csv";
    link.click();
    URL.revokeObjectURL(link.href);
  }

  function paint(mode) {
    document.documentElement.dataset.theme = mode;
    one("theme").querySelector("span").textContent = mode === "dark" ? "light" : "dark";
  }

  const system = matchMedia("(prefers-color-scheme: dark)");
  paint(system.matches ? "dark" : "light");
  system.addEventListener("change", (event) => { paint(event.matches ? "dark" : "light"); drawAll(); });
  one("theme").addEventListener("click", () => { paint(dark() ? "light" : "dark"); drawAll(); });
  on("csv", "click", csv);
  one("all").addEventListener("click", () => { state.focus = []; update(); });
  on("search", "input", list);
  on("deciding", "change", list);
  all(".tab").forEach((tab) => tab.addEventListener("click", () => { state.request = tab.dataset.request; update(); }));
  all(".chip[data-label]").forEach((chip) => chip.addEventListener("click", () => pick(chip.dataset.label)));
  all(".verdict, .summary tbody tr").forEach((item) => item.addEventListener("click", (event) => {
    if (!event.target.closest("details")) pick(item.dataset.label);
  }));
  all("thead button[data-sort]").forEach((button) => button.addEventListener("click", () => {
    state.down = state.sort === button.dataset.sort && !state.down;
    state.sort = button.dataset.sort;
    all("thead button[data-sort]").forEach((other) => delete other.dataset.order);
    button.dataset.order = state.down ? "down" : "up";
    list();
  }));

  list();
  await drawAll();
  await update();
  document.documentElement.dataset.drawn = Object.keys(state.views).length;
})();
