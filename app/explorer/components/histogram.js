export default function ({ data, parentElement, setTriggerValue }) {
  const root = parentElement.querySelector(".root"), find = (name) => root.querySelector(name);
  const d = JSON.parse(parsed(data)), n = d.counts.length, plot = find(".plot"), clear = find(".clear");
  const handles = [...root.querySelectorAll(".handle")], most = Math.max(1, ...d.counts);
  let chosen = d.chosen, start = null, waiting = null;

  const height = (count) =>
    count === 0 ? 0 : Math.max(0.025, d.log ? (Math.log10(count) + 0.3) / (Math.log10(most) + 0.3) : count / most);
  const bars = (from, to) => d.counts.slice(from, to).map((count, i) =>
    `M${from + i + 0.05} 1V${(1 - height(count)).toFixed(3)}h.9V1z`).join("");
  const range = (from, to) => {
    const total = d.counts.slice(from, to + 1).reduce((sum, count) => sum + count, 0);
    return `${number(d.edges[from])} to ${number(d.edges[to + 1])}: ${total.toLocaleString("en")} ${d.noun}`;
  };

  function draw(over = null) {
    const [from, to] = chosen ?? [0, n - 1];
    find(".in").setAttribute("d", bars(from, to + 1));
    find(".out").setAttribute("d", bars(0, from) + bars(to + 1, n));
    find(".over").setAttribute("d", over === null ? "" : `M${over} 0h1v1h-1z`);
    find(".readout").textContent = over === null ? range(from, to) : range(over, over);
    root.classList.toggle("chosen", chosen !== null);
    clear.hidden = chosen === null;
    handles.forEach((handle, i) => {
      const bin = i ? to : from;
      handle.style.left = `${(100 * (bin + i)) / n}%`;
      const now = { "aria-valuemin": 0, "aria-valuemax": n - 1, "aria-valuenow": bin, "aria-valuetext": number(d.edges[bin + i]) };
      Object.entries(now).forEach(([name, value]) => handle.setAttribute(name, value));
    });
  }

  const bin = (event) => {
    const box = plot.getBoundingClientRect();
    return Math.max(0, Math.min(n - 1, Math.floor(((event.clientX - box.left) / box.width) * n)));
  };
  function report(after) {
    clearTimeout(waiting);
    waiting = setTimeout(() => setTriggerValue("range", chosen ?? []), after);
  }
  function choose(range) {
    chosen = range;
    draw();
    report(0);
  }

  root.classList.toggle("brush", d.brush);
  find("svg").setAttribute("viewBox", `0 0 ${n} 1`);
  find(".title").textContent = d.title;
  plot.setAttribute("aria-label", d.title);
  find(".axis").replaceChildren(...[0, Math.round(n / 2), n].map((edge) => make("span", "", number(d.edges[edge]))));
  clear.onclick = () => choose(null);
  plot.onpointermove = (event) => {
    if (start !== null) chosen = [Math.min(start, bin(event)), Math.max(start, bin(event))];
    draw(start === null ? bin(event) : null);
  };
  plot.onpointerleave = () => draw();
  plot.onpointerdown = (event) => {
    if (!d.brush || event.button) return;
    const handle = handles.indexOf(event.target), [from, to] = chosen ?? [0, n - 1];
    start = chosen && handle >= 0 ? (handle ? from : to) : bin(event); // a handle moves one end
    plot.setPointerCapture(event.pointerId);
  };
  plot.onpointerup = (event) => {
    if (start === null) return;
    const range = [Math.min(start, bin(event)), Math.max(start, bin(event))];
    start = null;
    choose(range);
  };
  plot.onpointercancel = () => { start = null; chosen = d.chosen; draw(); };
  handles.forEach((handle, i) => {
    handle.onkeydown = (event) => {
      const ends = [...(chosen ?? [0, n - 1])];
      const to = { ArrowLeft: ends[i] - 1, ArrowRight: ends[i] + 1, PageDown: ends[i] - 5, PageUp: ends[i] + 5,
        Home: 0, End: n - 1 }[event.key];
      if (event.key === "Escape" && chosen) choose(null);
      if (to === undefined) return;
      event.preventDefault();
      event.stopPropagation(); // the page has shortcuts of its own
      ends[i] = Math.max(i ? ends[0] : 0, Math.min(i ? n - 1 : ends[1], to));
      chosen = ends;
      draw();
      report(250);
    };
  });
  draw();
}
