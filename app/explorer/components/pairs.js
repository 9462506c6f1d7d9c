export default function ({ data, parentElement, setTriggerValue }) {
  const root = parentElement.querySelector(".root"), text = parsed(data);
  if (root.drawn !== text) draw();
  root.drawn = text;

  function draw() {
    const d = JSON.parse(text), table = make("table"), head = table.createTHead().insertRow();
    const known = (side) => d.sides[side].density !== undefined;
    const columns = [
      ["a", "a"], ...(known("a") ? [["density_a", "density"], ["tokens_a", "active on"]] : []), ["cosine", "cosine"],
      ["b", "b"], ...(known("b") ? [["density_b", "density"], ["tokens_b", "active on"]] : []),
    ];
    columns.forEach(([key, label]) => {
      const cell = head.appendChild(make("th", key));
      cell.scope = "col";
      if (key.startsWith("tokens")) return cell.append(label);
      const button = cell.appendChild(make("button"));
      if (key === "a" || key === "b") write(button, d.names[key === "a" ? 0 : 1], 30, false);
      else button.append(label);
      if (key === d.sort) { cell.ariaSort = d.descending ? "descending" : "ascending"; button.append(d.descending ? " ▾" : " ▴"); }
      button.onclick = () => setTriggerValue("sorted", key);
    });
    const body = table.createTBody();
    const buttons = d.cosines.map((cosine, i) => {
      const line = body.insertRow(), pair = [d.sides.a.ids[i], d.sides.b.ids[i]];
      columns.forEach(([key]) => fill(line.insertCell(), key, i, d));
      const button = line.querySelector("button"), chosen = d.chosen?.[0] === pair[0] && d.chosen?.[1] === pair[1];
      button.ariaPressed = chosen;
      line.classList.toggle("chosen", chosen);
      button.ariaLabel = `feature ${pair[0]} with feature ${pair[1]}, cosine ${cosine}`;
      button.tabIndex = i ? -1 : 0;
      button.onclick = () => setTriggerValue("opened", pair);
      return button;
    });
    body.onkeydown = (event) => {
      const at = buttons.indexOf(event.target);
      const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: buttons.length - 1 }[event.key];
      if (!buttons[to] || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      buttons.forEach((button, i) => { button.tabIndex = i === to ? 0 : -1; });
      buttons[to].focus();
    };
    root.replaceChildren(table);
    if (d.total > d.size) root.append(pages(d, d.cosines.length, (step) => setTriggerValue("turned", step)));
  }

  function fill(cell, key, i, d) {
    cell.className = key;
    const side = d.sides[key.at(-1)];
    if (key === "a") cell.appendChild(make("button", "open", side.ids[i]));
    else if (key === "b") cell.append(side.ids[i]);
    else if (key === "cosine") cell.append(d.cosines[i]);
    else if (key.startsWith("density")) cell.append(side.density[i]);
    else side.tokens[i].forEach((token) => write(cell.appendChild(make("span", "token")), token, 24, false));
  }
}
