/* Makes and updates elements. */

/* An element with these properties (`className`, `onclick`, ...) and children. */
export function el(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

/* Makes the children of `parent` those of `wanted`. What is right already stays, and so does the
   reader's selection. */
export function sync(parent, wanted) {
  let at = parent.firstChild;
  for (const fresh of [...wanted.childNodes]) {
    const next = at?.nextSibling ?? null;
    if (!at) parent.append(fresh);
    else if (!at.isEqualNode(fresh)) {
      if (at.nodeName === "#text" && fresh.nodeName === "#text") setText(at, fresh.data);
      else if (at.cloneNode().isEqualNode(fresh.cloneNode())) sync(at, fresh);
      else at.replaceWith(fresh);
    }
    at = next;
  }
  while (at) [at] = [at.nextSibling, at.remove()];
}

function setText(node, text) {
  let same = 0;
  while (same < node.length && node.data[same] === text[same]) same++;
  node.replaceData(same, node.length - same, text.slice(same));
}
