// Puts menus and a box above each table that asks for them, which filter its rows. What is chosen
// stands in the address, so that a link can lead to a filtered table.

function parts(cell) {
  return cell.textContent.split(",").map(part => part.trim()).filter(part => part && part !== "–");
}

function tableAfter(place) {
  let next = place.nextElementSibling;
  while (next && !next.matches("table") && !next.querySelector("table")) {
    next = next.nextElementSibling;
  }
  return next && (next.matches("table") ? next : next.querySelector("table"));
}

function menu(name, values) {
  const select = document.createElement("select");
  select.name = name;
  select.setAttribute("aria-label", name);
  select.append(new Option(`${name}: any`, ""));
  [...values].sort().forEach(value => select.append(new Option(value, value)));
  return select;
}

function build(place) {
  const table = tableAfter(place);
  const headings = [...table.tHead.rows[0].cells].map(cell => cell.textContent.trim());
  const rows = [...table.tBodies[0].rows];
  const chosen = new URLSearchParams(location.search);
  const menus = place.dataset.columns.split(" ").filter(name => headings.includes(name)).map(name => {
    const column = headings.indexOf(name);
    const select = menu(name, new Set(rows.flatMap(row => parts(row.cells[column]))));
    select.value = chosen.get(name) ?? "";
    if (select.selectedIndex < 0) select.value = "";
    return [select, column];
  });
  const words = document.createElement("input");
  Object.assign(words, {type: "search", name: "words", placeholder: "words", value: chosen.get("words") ?? ""});
  words.setAttribute("aria-label", "words");
  const count = document.createElement("output");

  function apply() {
    const wanted = words.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !(menus.every(([select, column]) =>
        !select.value || parts(row.cells[column]).includes(select.value))
        && wanted.every(word => text.includes(word)));
      shown += !row.hidden;
    }
    count.value = `${shown} of ${rows.length}`;
    const query = new URLSearchParams();
    [...menus.map(([select]) => select), words].forEach(field => {
      if (field.value) query.set(field.name, field.value);
    });
    history.replaceState(null, "", (query.size ? `?${query}` : location.pathname) + location.hash);
  }

  [...menus.map(([select]) => select), words].forEach(field => field.addEventListener("input", apply));
  place.replaceChildren(...menus.map(([select]) => select), words, count);
  if (location.search) apply();
  else count.value = `${rows.length} of ${rows.length}`;
}

document.addEventListener("DOMContentLoaded", () => document.querySelectorAll(".filter").forEach(build));
