const NUMBERS = { density: ["density", "n"], maximum: ["maximum"], score: ["score", "note"] };

export default function ({ data, parentElement, setTriggerValue }) {
  const root = parentElement.querySelector(".root"), text = parsed(data);
  const main = parentElement.host.closest("[data-testid='stMain']");
  if (root.drawn !== text) draw();
  root.drawn = text;

  function draw() {
    const d = JSON.parse(text), table = make("table"), head = table.createTHead().insertRow();
    d.columns.forEach(([key, label, sortable, hint]) => {
      const cell = head.appendChild(make("th", key.startsWith("number:") ? "value" : key));
      cell.scope = "col";
      cell.title = hint ?? "";
      if (!sortable) return cell.append(label);
      const button = cell.appendChild(make("button", "", label + (key === d.sort ? (d.descending ? " ▾" : " ▴") : "")));
      if (key === d.sort) cell.ariaSort = d.descending ? "descending" : "ascending";
      button.onclick = () => setTriggerValue("sorted", key);
    });
    const body = table.createTBody(), keys = d.columns.map(([key]) => key);
    const links = d.rows.map((row, i) => {
      const line = body.insertRow();
      keys.forEach((key) => fill(line.insertCell(), key, row, d));
      const link = line.querySelector("a");
      link.tabIndex = i ? -1 : 0;
      link.onclick = (event) => {
        if (d.remember) keep(i);
        if (!plainClick(event)) return;
        event.preventDefault();
        if (d.opens) setTriggerValue("opened", row.id);
        else follow(link.href);
      };
      return link;
    });
    body.onkeydown = (event) => {
      const at = links.indexOf(event.target), key = event.key;
      const to = { ArrowDown: at + 1, j: at + 1, ArrowUp: at - 1, k: at - 1, Home: 0, End: links.length - 1 }[key];
      if (!links[to] || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      event.stopPropagation();
      focus(links, to);
    };
    root.replaceChildren(table);
    if (d.size) root.append(pages(d, d.rows.length, (step) => setTriggerValue("turned", step)));
    if (d.remember) restore(links);
  }

  function focus(links, to) {
    links.forEach((link, i) => { link.tabIndex = i === to ? 0 : -1; });
    links[to].focus();
  }

  function fill(cell, key, row, d) {
    cell.className = key;
    if (key === "id") {
      const link = cell.appendChild(make("a", "open", row.id));
      link.href = d.link + row.id;
    } else if (key in NUMBERS) {
      const [first, second] = NUMBERS[key];
      cell.append(row[first], ...(row[second] ? [make("small", "", row[second])] : []));
    } else if (key === "bars") {
      cell.append(sparkline(row.bars));
    } else if (key === "tokens") {
      row.tokens.filter((tokens) => tokens.length).forEach((tokens) => {
        const list = cell.appendChild(make("span", "list"));
        tokens.forEach((token) => write(list.appendChild(make("span", "token")), token, 24, false));
      });
    } else if (key.startsWith("number:")) {
      cell.className = "value";
      cell.append(row[key]?.[0] ?? "", make("small", "", row[key]?.[1] ?? ""));
    } else {
      if (row.explained) cell.appendChild(make("div", "explained", row.explained));
      if (!row.text) return;
      const snippet = cell.appendChild(make("div", "snippet"));
      let hit = null; // one frame for all tokens of the match
      row.text.forEach((token, i) => {
        if (i === row.lit[0]) hit = snippet.appendChild(make("span", "hit"));
        const span = (i >= row.lit[0] && i <= row.lit[1] ? hit : snippet).appendChild(make("span", "token"));
        if (row.shares[i] > 0) { span.classList.add("on"); span.style.setProperty("--share", row.shares[i] / 100); }
        write(span, token, 24, false);
      });
    }
  }

  // Heights are letters, a for 0 to z for the highest bar.
  function sparkline(heights) {
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    const path = svg.appendChild(document.createElementNS(svg.namespaceURI, "path"));
    svg.setAttribute("viewBox", `0 0 ${heights.length} 25`);
    svg.setAttribute("preserveAspectRatio", "none");
    svg.ariaHidden = "true";
    path.setAttribute("d", [...heights].map((h, i) => `M${i} 25v-${h.charCodeAt(0) - 97}h1V25z`).join(""));
    return svg;
  }

  // Where the reader was in this list, by its address: Back and a reload lead there.
  function keep(row = null) {
    const before = JSON.parse(sessionStorage.getItem(`saelab ${root.address}`) ?? "{}");
    sessionStorage.setItem(`saelab ${root.address}`, JSON.stringify({ top: main.scrollTop, row: row ?? before.row }));
  }

  function restore(links) {
    const again = root.address !== undefined;
    if (root.address === location.href) return;
    root.address = location.href;
    const saved = JSON.parse(sessionStorage.getItem(`saelab ${root.address}`) ?? "null");
    if (!saved && again) main.scrollTop = Math.min(main.scrollTop, root.getBoundingClientRect().top + main.scrollTop - 80);
    const back = () => { if (saved) main.scrollTop = saved.top; };
    requestAnimationFrame(back);
    setTimeout(back, 200); // what stands above the table has its height by then
    if (saved?.row !== undefined && links[saved.row]) focus(links, saved.row);
    main.onscroll = () => { if (root.isConnected && root.address === location.href) keep(); };
  }
}
