const make = (tag, name, text) => {
  const element = document.createElement(tag);
  if (name) element.className = name;
  if (text !== undefined) element.textContent = text;
  return element;
};

const number = (value) =>
  value === 0 ? "0" : Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : value.toPrecision(3);

// Writes a token. \x01 and \x02 enclose a mark for white space; Python has replaced every other control character.
const write = (element, token, longest, breaks) => {
  let left = longest;
  token.split(/[\x01\x02]/).forEach((piece, i) => {
    if (!piece || left < 0) return;
    const mark = i % 2 === 1, spaces = mark && breaks && /^␣×(\d+)$/.exec(piece);
    const text = spaces ? " ".repeat(spaces[1]) : mark && breaks && piece === "⇥" ? "\t" : piece;
    if (mark && text === piece) element.append(make("span", "mark", text));
    else element.append([...text].slice(0, left).join(""));
    if (mark && breaks && piece === "↵") element.append("\n");
    left -= text.length;
    if (left < 0) element.append(make("span", "mark", "…"));
  });
};

const parsed = (data) => new TextDecoder().decode(data);
const plainClick = (event) => event.button === 0 && !(event.metaKey || event.ctrlKey || event.shiftKey || event.altKey);

// Follows a link within the app. Streamlit then shows the page of the new address, as it does for Back;
// st.switch_page would leave an entry in the history that has the old page with the new parameters.
const follow = (href) => {
  history.pushState(null, "", href);
  dispatchEvent(new PopStateEvent("popstate", { state: null }));
};

// The bar under a list of which a part is shown: `n` lines from number d.first on, of d.total; turned(step) turns a page.
const pages = (d, n, turned) => {
  const box = make("nav", "pages"), last = d.first + n;
  const [before, after] = [[-1, `‹ previous ${d.size}`], [1, `next ${d.size} ›`]].map(([step, label]) => {
    const button = make("button", "", label);
    button.onclick = () => turned(step);
    return button;
  });
  before.disabled = d.first === 0;
  after.disabled = last >= d.total;
  const range = `${(d.first + 1).toLocaleString("en")} to ${last.toLocaleString("en")} of ${d.total.toLocaleString("en")}`;
  box.append(before, make("span", "", range), after);
  return box;
};
