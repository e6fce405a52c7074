"use strict";
// The camera: a live image and a button to capture it.

let stream = null;

/** Opens the camera; captured images are passed to a function as files. */
async function openCamera(add) {
  find("camera-message").textContent = "";
  find("capture").disabled = true;
  find("capture").onclick = () => capture(add);
  find("camera-dialog").showModal();
  if (!navigator.mediaDevices) {
    find("camera-message").textContent =
      "Browsers allow the camera on https and localhost only. Open this page there, or choose images.";
    return;
  }
  const video = {
    facingMode: { ideal: "environment" },
    width: { ideal: 1920 },
    height: { ideal: 1080 },
  };
  try {
    const opened = await navigator.mediaDevices.getUserMedia({ video });
    if (!find("camera-dialog").open) {
      // closed while the user was asked
      for (const track of opened.getTracks()) track.stop();
      return;
    }
    stream = opened;
    find("video").srcObject = stream;
    await find("video").play();
    find("capture").disabled = false;
    find("capture").focus();
  } catch (error) {
    if (find("camera-dialog").open) find("camera-message").textContent = cameraProblem(error);
  }
}

function cameraProblem(error) {
  if (error.name === "NotAllowedError")
    return "The camera is not allowed. Allow it in the browser's settings of this page.";
  if (error.name === "NotFoundError") return "No camera was found. Connect one, or choose images.";
  return `The camera cannot be used (${error.message}). Close other programs that use it.`;
}

/** Passes the current frame on, without loss. */
function capture(add) {
  const video = find("video");
  const [frame, context] = canvas(video.videoWidth, video.videoHeight, false);
  context.drawImage(video, 0, 0);
  const time = new Date().toTimeString().slice(0, 8).replaceAll(":", "-");
  frame.toBlob((content) =>
    add([new File([content], `camera ${time}.png`, { type: "image/png" })]),
  );
  find("camera-dialog").close();
}

/** Ends the stream, so that the camera's light goes out. */
function closeCamera() {
  for (const track of stream?.getTracks() ?? []) track.stop();
  stream = find("video").srcObject = null;
}
