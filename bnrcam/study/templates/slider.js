const data = JSON.parse(document.getElementById('data').textContent);
const slider = document.getElementById('threshold');
const colours = Object.fromEntries(data.labels.map(label => [label.value, label.colour]));

async function pixels(source) {
  const image = new Image();
  image.src = source;
  await image.decode();
  const context = Object.assign(document.createElement('canvas'), {width: image.width, height: image.height}).getContext('2d');
  context.drawImage(image, 0, 0);
  return context.getImageData(0, 0, image.width, image.height);
}

// the photograph, with label(i) of each pixel as colour over it; returns the number of coloured pixels
function paint(canvas, photo, label) {
  const picture = new ImageData(new Uint8ClampedArray(photo.data), photo.width), out = picture.data;
  let count = 0;
  for (let i = 0; i < out.length; i += 4) {
    const value = label(i);
    if (!value) continue;
    count += 1;
    for (let k = 0; k < 3; k++) out[i + k] = .35 * out[i + k] + .65 * colours[value][k];
  }
  canvas.getContext('2d').putImageData(picture, 0, 0);
  return count;
}

function show() {
  const index = Number(slider.value), threshold = data.thresholds[index].toFixed(2);
  document.getElementById('value').textContent = threshold;
  slider.setAttribute('aria-valuetext', threshold);
  for (const cell of document.querySelectorAll('.miou'))
    cell.textContent = data.models[cell.dataset.model].miou[index].toFixed(1) + ' %';
  for (const canvas of document.querySelectorAll('canvas.mask')) {
    const image = data.images[canvas.dataset.image], map = image.pixels[canvas.dataset.model].data;
    const count = paint(canvas, image.picture, i => map[i] > index ? map[i + 1] : 0);
    canvas.dataset.pixels = count;
    canvas.setAttribute('aria-label', `Mask of ${canvas.dataset.model} on ${image.name} at threshold ${threshold}: `
      + `${(100 * count / canvas.width / canvas.height).toFixed(0)} % of the image`);
  }
}

async function start() {
  for (const image of data.images) {
    image.picture = await pixels(image.photo);
    image.pixels = {};
    for (const title in image.maps) image.pixels[title] = await pixels(image.maps[title]);
  }
  for (const canvas of document.querySelectorAll('canvas:not(.mask)')) {
    const image = data.images[canvas.dataset.image], map = Object.values(image.pixels)[0].data;
    paint(canvas, image.picture, i => map[i + 2]);
  }
  slider.addEventListener('input', show);
  show();
  document.body.dataset.ready = 'yes';
}
start();
