const LONGEST = 100; // characters of a token in a line; the card shows more

export default function ({ data, parentElement, setTriggerValue }) {
  const root = parentElement.querySelector(".root"), [lines, card] = root.children;
  const text = parsed(data);
  const cleanUp = () => root.abort?.abort();
  if (root.drawn === text) return cleanUp; // a rerun of Python keeps the pinned card and the focus
  cleanUp();
  root.drawn = text;
  root.abort = new AbortController();
  const on = (element, type, act, capture) =>
    element.addEventListener(type, act, { signal: root.abort.signal, capture, passive: type === "scroll" });
  const d = JSON.parse(text);
  let spans = [], shown = null, pinned = null;

  function draw() {
    const breaks = localStorage.getItem("saelab-breaks") === "1";
    const bar = make("div", "bar"), legend = make("span", "dim", `${d.what} 0`), label = make("label");
    const box = Object.assign(make("input"), { type: "checkbox", checked: breaks });
    legend.append(make("span", "scale"), number(d.strongest) + (d.above ? " or more" : ""));
    label.append(box, " line breaks");
    box.onchange = () => { localStorage.setItem("saelab-breaks", box.checked ? "1" : "0"); draw(); };
    bar.append(legend, label);
    lines.replaceChildren(...(d.legend ? [bar] : []));
    spans = d.lines.map((line, l) => {
      if (line.heading) lines.append(make("div", "heading", line.heading));
      const row = lines.appendChild(make("div", line.alike ? "line alike" : "line"));
      const side = make("div", "side", line.side), shownText = make("div", "text");
      row.hidden = Boolean(line.alike);
      if (line.more) side.append(more(l, line.more));
      if (line.side || line.more) row.append(side);
      else row.style.display = "block";
      row.append(shownText);
      if (line.note) row.append(make("div", "note", line.note));
      return line.tokens.map((token, k) => {
        const span = shownText.appendChild(make("span", "token"));
        write(span, d.texts[token], LONGEST, breaks);
        span.tabIndex = -1;
        span.setAttribute("role", "button");
        span.at = [l, k];
        if (k === line.peak) span.classList.add("peak");
        if (line.marks?.includes(k)) span.classList.add("marked");
        if (line.activations[k] > 0) {
          span.classList.add("on");
          span.style.setProperty("--share", Math.min(1, line.activations[k] / d.strongest).toFixed(3));
        }
        return span;
      });
    });
    if (spans[0]?.[0]) spans[0][d.lines[0].peak ?? 0].tabIndex = 0;
  }

  function more(first, n) {
    const button = make("button", "", `+${n} alike`);
    button.title = "examples with the same tokens around the peak";
    button.onclick = () => {
      const rows = [...lines.querySelectorAll(".line")].slice(first + 1, first + 1 + n);
      rows.forEach((row) => { row.hidden = !row.hidden; });
    };
    return button;
  }

  function fill(span) {
    const [l, k] = span.at, line = d.lines[l], activation = line.activations[k];
    const token = make("div", "token full"), share = line.percentiles?.[k];
    write(token, d.texts[line.tokens[k]] || "\x01no character of its own\x02", Infinity, false);
    const silent = d.what === "activation" ? "not active" : `${d.what} 0`;
    const value = activation > 0 ? `${d.what} ${number(activation)}` : silent;
    const above = share === 100 ? ", its largest" : `, at or above ${share}% of its activations`;
    const rank = activation > 0 && share !== undefined ? above : "";
    const place = line.row === undefined ? `token ${line.start + k}` : `row ${line.row}, token ${line.start + k}`;
    card.replaceChildren(token, make("div", "", value + rank), make("div", "dim", `id ${line.ids[k]} · ${place}`));
    const others = line.others?.[k] ?? [];
    if (!others.length) return;
    const list = make("ol");
    for (let i = 0; i < others.length; i += 2) {
      const item = list.appendChild(make("li")), link = item.appendChild(make("a", "", others[i]));
      link.href = d.link + others[i];
      link.onclick = (event) => {
        if (!plainClick(event)) return;
        event.preventDefault();
        if (d.opens) setTriggerValue("opened", others[i]);
        else follow(link.href);
        if (innerWidth < 640) show(null); // on a phone the card would cover what was opened
      };
      const name = make("span", "dim token");
      write(name, d.names[others[i]] ?? "", 40, false);
      item.append(make("span", "", number(others[i + 1])), name);
      if (d.explained[others[i]]) item.append(make("span", "explained", d.explained[others[i]]));
    }
    card.append(make("div", "dim", pinned ? "strongest other features here" : "strongest others here; click to pin"), list);
  }

  function place() {
    const at = shown.getClientRects()[0], below = at.bottom + 6, height = card.offsetHeight;
    card.style.left = `${Math.max(8, Math.min(at.left, innerWidth - card.offsetWidth - 8))}px`;
    card.style.top = `${below + height < innerHeight ? below : Math.max(8, at.top - height - 6)}px`;
  }

  function show(span, pin = false) {
    shown?.classList.remove("chosen");
    shown = span;
    pinned = pin ? span : null;
    card.classList.toggle("pinned", pin);
    if (!span) return card.togglePopover(false);
    if (pin) span.classList.add("chosen");
    fill(span);
    card.togglePopover(true);
    place();
    if (pin && d.report) setTriggerValue("pinned", span.at);
  }

  function walk(event) {
    const span = event.target.closest?.(".token"), at = span?.at;
    if (event.key === "Escape") {
      pinned?.focus();
      return show(null);
    }
    if (!at) return;
    const [l, k] = at, to = { ArrowRight: [l, k + 1], ArrowLeft: [l, k - 1], Home: [l, 0], End: [l, spans[l].length - 1] };
    const seen = (from, step) => { while (spans[from]?.[0].closest(".line").hidden) from += step; return from; };
    const vertical = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    const goal = vertical ? [seen(l + vertical, vertical), k] : to[event.key];
    if (event.key === "Enter" || event.key === " ") {
      show(span, true);
      card.querySelector("a")?.focus();
    } else if (goal) {
      const next = spans[goal[0]]?.[Math.min(goal[1], (spans[goal[0]]?.length ?? 1) - 1)];
      if (next) { span.tabIndex = -1; next.tabIndex = 0; next.focus(); show(next); }
    } else return;
    event.preventDefault();
    event.stopPropagation(); // the page has shortcuts of its own
  }

  draw();
  on(lines, "pointermove", (event) => { // not pointerover, which also comes when a card closes above a token
    const span = event.target.closest(".token");
    if (span && span !== shown && !pinned && event.pointerType !== "touch") show(span);
  });
  on(lines, "pointerleave", () => { if (shown && !pinned) show(null); });
  on(lines, "click", (event) => {
    const span = event.target.closest(".token");
    if (!span) return;
    spans.flat().forEach((each) => { each.tabIndex = each === span ? 0 : -1; });
    show(pinned === span ? null : span, pinned !== span);
  });
  on(lines, "focusout", () => { if (shown && !pinned) show(null); });
  on(root, "keydown", walk);
  on(document, "pointerdown", (event) => { if (shown && !event.composedPath().includes(root)) show(null); });
  on(document, "scroll", () => { if (shown) pinned ? place() : show(null); }, true);
  return () => { cleanUp(); root.drawn = null; };
}
